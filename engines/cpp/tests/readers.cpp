// What the library reads, for tests to hold against the Python host:
//
//   readers tokenize FILE NAME MAX PAD PREFIX SUFFIX PADDING_SIDE TRUNCATION_SIDE LENGTH
//       Each prompt of the standard input, 4 bytes of its size (little-endian) and its bytes, as a
//       line: the ids. PREFIX and SUFFIX are ids between commas. A LENGTH of "all" is what the
//       prompt takes.
//   readers read KIND PATH...      KIND: manifest (a file), bundle (a folder), safetensors or png
//       A line each: "ok" and what was read, or "error" and the message.
//   readers tensor PATH NAME       the tensor's values as float32, on the standard output
//   readers pixels PATH            a PNG's width, height and bytes of RGB and alpha
//   readers write PATH WIDTH HEIGHT [KEYWORD TEXT]...      a PNG of the standard input's RGB
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <vector>

#include "errors.hpp"
#include "files/bundle.hpp"
#include "files/png.hpp"
#include "files/safetensors.hpp"
#include "text/tokenizer.hpp"

namespace {

using namespace fluxdeploy;
using Arguments = std::vector<std::string>;

std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<std::int64_t> ids(const std::string& text) {
    std::vector<std::int64_t> result;
    std::istringstream stream(text);
    for (std::string id; std::getline(stream, id, ',');) result.push_back(std::stoll(id));
    return result;
}

// The bytes of one prompt; false at the input's end.
bool next_prompt(std::string& prompt) {
    unsigned char size[4];
    if (!std::cin.read(reinterpret_cast<char*>(size), sizeof size)) return false;
    prompt.resize(size[0] | size[1] << 8 | size[2] << 16 | static_cast<std::size_t>(size[3]) << 24);
    std::cin.read(prompt.data(), static_cast<std::streamsize>(prompt.size()));
    return true;
}

void tokenize(const Arguments& given) {
    TokenizerRecord record;
    record.max_length = std::stoll(given.at(2));
    record.pad_id = std::stoll(given.at(3));
    record.prefix = ids(given.at(4));
    record.suffix = ids(given.at(5));
    record.padding_side = given.at(6);
    record.truncation_side = given.at(7);
    const auto tokenizer =
        Tokenizer::parse(given.at(1), contents(given.at(0)), given.at(0), record);
    const bool all = given.at(8) == "all";
    for (std::string prompt; next_prompt(prompt);) {
        try {
            const std::int64_t length = all ? tokenizer.count(prompt) : std::stoll(given[8]);
            std::string line;
            for (const auto id : tokenizer.encode(prompt, length)) line += ' ' + std::to_string(id);
            std::cout << line.substr(line.empty() ? 0 : 1) << '\n';
        } catch (const Error& error) {
            std::cout << "error " << error.what() << '\n';
        }
    }
}

std::string read_one(const std::string& kind, const std::string& path) {
    if (kind == "manifest") {
        return std::to_string(parse_manifest(contents(path), path).components.size());
    }
    if (kind == "bundle") return open_bundle(path).content_hash;
    if (kind == "safetensors") {
        std::string names;
        for (const auto& tensor : read_header(path).tensors) names += tensor.first + " ";
        return names;
    }
    const Picture picture = read_png(path);
    return std::to_string(picture.width) + " " + std::to_string(picture.height);
}

void read(const Arguments& given) {
    for (std::size_t i = 1; i < given.size(); ++i) {
        try {
            const std::string found = read_one(given[0], given[i]);
            std::cout << "ok " << found << '\n';
        } catch (const Error& error) {
            std::string words = error.what();
            for (char& letter : words) letter = letter == '\n' ? ' ' : letter;
            std::cout << "error " << words << '\n';
        }
    }
}

void put(const void* data, std::size_t size) {
    std::cout.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
}

void tensor(const Arguments& given) {
    const auto values = read_float32(read_header(given.at(0)), given.at(1));
    put(values.data(), values.size() * sizeof(float));
}

void pixels(const Arguments& given) {
    const Picture picture = read_png(given.at(0));
    std::cout << picture.width << ' ' << picture.height << ' ' << picture.alpha.size() << '\n';
    put(picture.rgb.data(), picture.rgb.size());
    put(picture.alpha.data(), picture.alpha.size());
}

void write(const Arguments& given) {
    Picture picture;
    picture.width = std::stoll(given.at(1));
    picture.height = std::stoll(given.at(2));
    const std::string bytes{std::istreambuf_iterator<char>(std::cin), {}};
    picture.rgb.assign(bytes.begin(), bytes.end());
    PngText text;
    for (std::size_t i = 3; i + 1 < given.size(); i += 2) text.emplace_back(given[i], given[i + 1]);
    write_png(given.at(0), picture, text);
}

}  // namespace

int main(int count, char** given) {
    const std::map<std::string, std::function<void(const Arguments&)>> commands{
        {"tokenize", tokenize}, {"read", read},   {"tensor", tensor},
        {"pixels", pixels},     {"write", write},
    };
    const auto command = commands.find(count > 1 ? given[1] : "");
    if (command == commands.end()) return 2;
    try {
        command->second(Arguments(given + 2, given + count));
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
    return 0;
}
