// What goes wrong, as a code for programs and a sentence for people.
#pragma once

#include <stdexcept>
#include <string>

#include "ahn.h"

namespace ahn {

struct Error : std::runtime_error {
  ahn_status status;

  Error(ahn_status status, const std::string& what)
      : std::runtime_error(what), status(status) {}
};

// A name from a file, fit for one line: quoted, escaped, not endless.
std::string show(const std::string& text);

}  // namespace ahn
