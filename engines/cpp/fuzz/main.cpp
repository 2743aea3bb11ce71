// Gives the library's readers damaged files: each is read or refused with an error of its own,
// soon, and of a bundle nothing outside is opened.
//
//   fluxdeploy-fuzz SEEDS SCRATCH COUNT [FIRST]
//
// SEEDS has a folder of whole files for each kind: manifest, tokenizer, safetensors, png. COUNT
// inputs are made of them, by their numbers from FIRST on, the kinds in turn. A line for each kind
// says how many were read and how many refused. Ends at once where a reader fails; the input is
// then in SCRATCH/input.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <set>

#include "errors.hpp"
#include "files/bundle.hpp"
#include "files/png.hpp"
#include "files/safetensors.hpp"
#include "mutator.hpp"
#include "text/tokenizer.hpp"

namespace {

namespace fs = std::filesystem;
using namespace fluxdeploy;
using fluxdeploy::fuzz::Mutator;

constexpr unsigned kSeconds = 10;
constexpr std::size_t kMaxMessage = 3000;

// The folder that all opened files must lie in, while one is set; and the first that did not, which
// several threads may find.
std::string allowed;
std::mutex finding;
std::string outside;

}  // namespace

// The linker puts this in the place of the library's calls of `open`: --wrap=open.
extern "C" int __real_open(const char* path, int flags, ...);

extern "C" int __wrap_open(const char* path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const mode_t mode = flags & O_CREAT ? static_cast<mode_t>(va_arg(rest, int)) : 0;
    va_end(rest);
    if (!allowed.empty()) {
        char* real = ::realpath(path, nullptr);
        const std::string target = real ? real : path;
        std::free(real);
        const std::lock_guard<std::mutex> lock(finding);
        if (target.compare(0, allowed.size(), allowed) != 0 && outside.empty()) outside = target;
    }
    return __real_open(path, flags, mode);
}

namespace {

std::string contents(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void store(const fs::path& path, const std::string& data) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << data;
}

// A reader of one kind of file, and what became of its inputs.
struct Reader {
    const char* kind;
    void (*read)(const std::string& data, const fs::path& scratch);
    std::vector<std::string> seeds;
    std::size_t accepted = 0;
    std::size_t refused = 0;
    double slowest = 0;
};

// The manifest alone, and the bundle that it would be of: files outside, and links to them, lie
// where its paths may lead.
void read_manifest_of(const std::string& data, const fs::path& scratch) {
    const fs::path root = scratch / "bundle";
    store(root / kManifestName, data);
    allowed = fs::canonical(root).string() + "/";
    outside.clear();
    try {
        const Bundle bundle = open_bundle(root);
        for (const auto& [path, record] : bundle.manifest.files()) {
            require_unchanged(bundle, {record});
            read_recorded(bundle, record);
        }
    } catch (const Error&) {
        allowed.clear();
        throw;
    }
    allowed.clear();
}

void read_tokenizer(const std::string& data, const fs::path&) {
    TokenizerRecord record;
    record.max_length = 77;
    record.prefix = {1};
    record.suffix = {2};
    record.padding_side = "right";
    record.truncation_side = "right";
    const auto tokenizer = Tokenizer::parse("t5", data, "x.json", record);
    for (const char* prompt :
         {"", "a red circle above a blue square", "it's  4k!! <extra_id_3> <|endoftext|> </s>",
          "\xC3\x9Cn\xC3\xAF \xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA7 \xEF\xB7\xBA "
          "e\xCC\x81"}) {
        if (tokenizer.encode(prompt).size() != 77) std::abort();
        tokenizer.count(prompt);
    }
}

void read_safetensors(const std::string& data, const fs::path& scratch) {
    const fs::path path = scratch / "x.safetensors";
    store(path, data);
    const TensorFile file = read_header(path);
    for (const auto& [name, entry] : file.tensors) {
        if (static_cast<std::int64_t>(read_bytes(file, name).size()) != entry.nbytes) std::abort();
        if (entry.dtype == "F32" || entry.dtype == "F16" || entry.dtype == "BF16") {
            read_float32(file, name);
        }
        if (entry.dtype == "I32") read_int32(file, name);
    }
}

void read_picture(const std::string& data, const fs::path&) {
    const Picture picture = decode_png(data, "x.png");
    const auto pixels = static_cast<std::size_t>(picture.width * picture.height);
    if (picture.rgb.size() != 3 * pixels) std::abort();
    if (!picture.alpha.empty() && picture.alpha.size() != pixels) std::abort();
}

std::string damaged(const Reader& reader, std::uint64_t number) {
    Mutator mutator(number);
    if (reader.read == read_safetensors) return mutator.safetensors(reader.seeds);
    if (reader.read == read_picture) return mutator.png(reader.seeds);
    return mutator.text(reader.seeds);
}

[[noreturn]] void fail(const Reader& reader, std::uint64_t number, const char* why) {
    std::fprintf(stderr, "%s, input %llu: %s\n", reader.kind,
                 static_cast<unsigned long long>(number), why);
    std::exit(1);
}

void try_one(Reader& reader, std::uint64_t number, const fs::path& scratch) {
    const std::string data = damaged(reader, number);
    store(scratch / "input", data);
    const auto started = std::chrono::steady_clock::now();
    ::alarm(kSeconds);
    try {
        reader.read(data, scratch);
        ++reader.accepted;
    } catch (const Error& error) {
        const std::size_t words = std::strlen(error.what());
        if (words == 0 || words > kMaxMessage) fail(reader, number, "its message has no fit size");
        ++reader.refused;
    } catch (const std::exception& error) {
        fail(reader, number, error.what());
    }
    ::alarm(0);
    if (!outside.empty()) fail(reader, number, ("it opened " + outside).c_str());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
    reader.slowest = std::max(reader.slowest, took.count());
}

// Files for the paths of the seeds' manifests, and others that no manifest may reach.
void prepare(const fs::path& scratch, const fs::path& seeds) {
    fs::create_directories(scratch / "bundle");
    fs::copy(seeds / "bundle", scratch / "bundle",
             fs::copy_options::recursive | fs::copy_options::overwrite_existing);
    store(scratch / "outside", "secret");
    std::error_code ignored;
    fs::create_directory_symlink("..", scratch / "bundle/link", ignored);
}

std::vector<std::string> whole_files(const fs::path& folder) {
    std::set<fs::path> paths;
    for (const auto& entry : fs::directory_iterator(folder)) paths.insert(entry.path());
    std::vector<std::string> result;
    for (const auto& path : paths) result.push_back(contents(path));
    return result;
}

}  // namespace

int main(int count, char** given) {
    if (count < 4) return 2;
    const fs::path seeds = given[1];
    const fs::path scratch = given[2];
    const std::uint64_t inputs = std::stoull(given[3]);
    const std::uint64_t first = count > 4 ? std::stoull(given[4]) : 0;
    prepare(scratch, seeds);
    Reader readers[] = {{"manifest", read_manifest_of, {}},
                        {"tokenizer", read_tokenizer, {}},
                        {"safetensors", read_safetensors, {}},
                        {"png", read_picture, {}}};
    for (Reader& reader : readers) {
        reader.seeds = whole_files(seeds / reader.kind);
        // What is whole must be read: else damage would only be damage to what is refused anyway.
        for (const auto& seed : reader.seeds) reader.read(seed, scratch);
    }
    for (std::uint64_t i = first; i < first + inputs; ++i) {
        try_one(readers[i % std::size(readers)], i, scratch);
    }
    for (const Reader& reader : readers) {
        std::printf("%s: %zu read, %zu refused, the slowest took %.3f s\n", reader.kind,
                    reader.accepted, reader.refused, reader.slowest);
    }
    return 0;
}
