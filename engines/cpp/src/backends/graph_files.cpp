// A graph names the files of its weights, and a runtime reads whatever it names. So the protocol
// buffers are walked here, more strictly than any parser does: every occurrence of a field is
// looked at where a parser keeps the last one, and what no tool writes (groups, numbers in more
// bytes than they need) is refused. So a parser cannot see a file that was not seen here. See
// https://protobuf.dev/programming-guides/encoding/ and onnx.proto.
#include "backends/graph_files.hpp"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <set>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "errors.hpp"

namespace fluxdeploy {
namespace {

constexpr int kMaxDepth = 64;                  // a graph within an If within a Loop takes 12
constexpr int kMaxFields = 1'000'000;          // FLUX.1's largest graph has less than half
constexpr const char* kLoading = "EPContext";  // an operator that reads files of its own

enum class Message { model, training, function, graph, node, attribute, sparse, tensor, entry };

// The message in a field through which a model reaches a tensor's external data.
const Message* inner(Message message, std::uint64_t number) {
    struct Row {
        Message message;
        std::uint64_t number;
        Message inner;
    };
    static constexpr Row rows[] = {
        {Message::model, 7, Message::graph},         {Message::model, 20, Message::training},
        {Message::model, 25, Message::function},     {Message::training, 1, Message::graph},
        {Message::training, 2, Message::graph},      {Message::function, 7, Message::node},
        {Message::function, 11, Message::attribute}, {Message::graph, 1, Message::node},
        {Message::graph, 5, Message::tensor},        {Message::graph, 15, Message::sparse},
        {Message::node, 5, Message::attribute},      {Message::attribute, 5, Message::tensor},
        {Message::attribute, 6, Message::graph},     {Message::attribute, 10, Message::tensor},
        {Message::attribute, 11, Message::graph},    {Message::attribute, 22, Message::sparse},
        {Message::attribute, 23, Message::sparse},   {Message::sparse, 1, Message::tensor},
        {Message::sparse, 2, Message::tensor},       {Message::tensor, 13, Message::entry},
    };
    for (const Row& row : rows) {
        if (row.message == message && row.number == number) return &row.inner;
    }
    return nullptr;
}

struct Broken : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Takes a number of base 128 from the front.
std::uint64_t varint(std::string_view& bytes) {
    std::uint64_t value = 0;
    for (int shift = 0; !bytes.empty(); shift += 7) {
        if (shift > 63) throw Broken("it has a number of more than 64 bits");
        const auto byte = static_cast<std::uint8_t>(bytes.front());
        bytes.remove_prefix(1);
        value |= static_cast<std::uint64_t>(byte & 127u) << shift;
        if (byte < 128) {
            if (byte == 0 && shift != 0) {
                throw Broken("it has a number in more bytes than it needs");
            }
            return value;
        }
    }
    throw Broken("it is cut off, or no ONNX model");
}

// Takes the next field from the front; the number of one without a length is given as 0.
std::pair<std::uint64_t, std::string_view> field(std::string_view& bytes) {
    const std::uint64_t tag = varint(bytes);
    const std::uint64_t number = tag >> 3;
    if (number == 0 || tag >> 32 != 0) throw Broken("it has a field without a number");
    std::uint64_t size = 0;
    switch (tag & 7u) {
        case 0:
            varint(bytes);
            break;
        case 1:
            size = 8;
            break;
        case 2:
            size = varint(bytes);
            break;
        case 5:
            size = 4;
            break;
        default:
            throw Broken("it has a field of an unknown kind, or is no ONNX model");
    }
    if (size > bytes.size()) throw Broken("it is cut off, or no ONNX model");
    const std::string_view value = bytes.substr(0, static_cast<std::size_t>(size));
    bytes.remove_prefix(value.size());
    return {(tag & 7u) == 2 ? number : 0, value};
}

struct GraphFiles {
    std::set<std::string> locations;
    bool loads = false;
};

GraphFiles find_files(std::string_view data) {
    if (data.size() >= 8 && data.substr(4, 4) == "ORTM") {
        throw Broken("it is a model in ONNX Runtime's own format");
    }
    struct Waiting {
        Message message;
        std::string_view bytes;
        int depth;
    };
    GraphFiles found;
    std::vector<Waiting> waiting{{Message::model, data, 1}};
    int left = kMaxFields;
    while (!waiting.empty()) {
        auto [message, bytes, depth] = waiting.back();
        waiting.pop_back();
        if (depth > kMaxDepth) {
            throw Broken("its messages are nested more than " + std::to_string(kMaxDepth) +
                         " deep");
        }
        bool location = false;
        std::vector<std::string_view> values;
        while (!bytes.empty()) {
            const auto [number, value] = field(bytes);
            if (--left < 0) {
                throw Broken("it has more than " + std::to_string(kMaxFields) + " fields");
            }
            if (const Message* next = inner(message, number)) {
                waiting.push_back({*next, value, depth + 1});
            } else if (message == Message::node && number == 4) {
                found.loads = found.loads || value == kLoading;
            } else if (message == Message::entry && number == 1) {
                location = location || value == "location";
            } else if (message == Message::entry && number == 2) {
                values.push_back(value);
            }
        }
        if (location && values.empty()) found.locations.insert("");
        if (location) found.locations.insert(values.begin(), values.end());
    }
    return found;
}

std::string location_problem(const std::string& graph, const std::string& location,
                             const ComponentRecord& record) {
    std::string problem = path_problem(location);
    if (!problem.empty()) return problem;
    const std::string path =
        (std::filesystem::path(graph).parent_path() / location).generic_string();
    const bool recorded = std::any_of(record.files.begin(), record.files.end(),
                                      [&](const FileRecord& file) { return file.path == path; });
    return recorded ? "" : "is not among the component's files in the manifest";
}

}  // namespace

void check_graph(const Bundle& bundle, const ComponentRecord& record, const std::string& path) {
    const std::string graph = bundle.path(path).string();
    const std::string rebuild =
        " Build the bundle again with `fluxdeploy build`, or get it from whom you trust.";
    const auto refuse = [&](const std::string& why) {
        throw Error(ErrorCode::bundle, graph + " " + why + "." + rebuild);
    };
    if (path.size() < 5 || path.substr(path.size() - 5) != ".onnx") {
        refuse("cannot be opened as a graph: it is no .onnx file");
    }
    const auto file = std::find_if(record.files.begin(), record.files.end(),
                                   [&](const FileRecord& each) { return each.path == path; });
    const std::string bytes = read_recorded(bundle, *file);
    GraphFiles found;
    try {
        found = find_files(bytes);
    } catch (const Broken& error) {
        refuse("cannot be opened as a graph: " + std::string(error.what()));
    }
    for (const std::string& location : found.locations) {
        const std::string problem = location_problem(path, location, record);
        if (!problem.empty()) {
            refuse("takes weights from '" + location + "', which " + problem +
                   ", so it is not opened");
        }
    }
    if (found.loads) {
        refuse("has the operator " + std::string(kLoading) +
               ", which reads files of its own, so it is not opened");
    }
}

}  // namespace fluxdeploy
