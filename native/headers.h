// What gRPC says in the headers of a call, and of its end.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace leptonic {

// Percent-encoded where gRPC asks for it; what is too long is cut between two characters.
std::string encoded(std::string_view text);
// grpc-timeout: at most eight digits and a unit. -1: it is none.
int64_t timeout_ns(std::string_view text);
bool is_grpc(std::string_view content_type);
bool knows_encoding(std::string_view encoding);

}  // namespace leptonic
