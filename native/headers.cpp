#include "headers.h"

#include <algorithm>

namespace leptonic {

namespace {

constexpr size_t kTextBytesMax = 8000;  // of a status as it is sent: clients take 8 KiB of headers

}  // namespace

std::string encoded(std::string_view text) {
  constexpr std::string_view digits = "0123456789ABCDEF";
  std::string safe;
  size_t whole = 0;  // up to the last character that fits
  for (unsigned char c : text) {
    bool continues = (c & 0xc0) == 0x80;
    if (!continues) whole = safe.size();
    if (c >= 0x20 && c < 0x7f && c != '%') safe += static_cast<char>(c);
    else (safe += '%') += {digits[c >> 4], digits[c & 15]};
    if (safe.size() > kTextBytesMax) {
      safe.resize(whole);
      break;
    }
  }
  return safe;
}

int64_t timeout_ns(std::string_view text) {
  if (text.size() < 2 || text.size() > 9) return -1;
  int64_t amount = 0;
  for (char c : text.substr(0, text.size() - 1)) {
    if (c < '0' || c > '9') return -1;
    amount = amount * 10 + (c - '0');
  }
  switch (text.back()) {
    case 'H': return std::min<int64_t>(amount, 1'000'000) * 3'600'000'000'000;
    case 'M': return amount * 60'000'000'000;
    case 'S': return amount * 1'000'000'000;
    case 'm': return amount * 1'000'000;
    case 'u': return amount * 1'000;
    case 'n': return amount;
    default: return -1;
  }
}

bool is_grpc(std::string_view content_type) {
  constexpr std::string_view kind = "application/grpc";
  if (!content_type.starts_with(kind)) return false;
  content_type.remove_prefix(kind.size());
  return content_type.empty() || content_type[0] == '+' || content_type[0] == ';';
}

bool knows_encoding(std::string_view encoding) {
  return encoding.empty() || encoding == "identity" || encoding == "gzip" || encoding == "deflate";
}

}  // namespace leptonic
