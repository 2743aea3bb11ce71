#include "text/model.hpp"

#include "text/format.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {

std::unique_ptr<const Model> read_model(const Json& json) {
    const std::string type = text_member(json, "its model", "type");
    if (type == "BPE") return read_bpe(json);
    if (type == "Unigram") return read_unigram(json);
    throw Unsupported("its model " + type + " is not known here");
}

std::string byte_token(char byte) {
    constexpr const char* digits = "0123456789ABCDEF";
    const auto code = static_cast<unsigned char>(byte);
    return std::string("<0x") + digits[code >> 4] + digits[code & 15] + ">";
}

}  // namespace fluxdeploy
