// One safetensors file that may come from anyone: its header is judged before a byte of it is
// believed. No array library is needed here.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ahn {

struct TensorInfo {
  std::string dtype;  // as the format names it
  std::vector<int64_t> shape;
  uint64_t begin, end;  // from the end of the header

  bool operator==(const TensorInfo& o) const { return dtype == o.dtype && shape == o.shape; }
};

// Bytes of one number, or 0 for a dtype that no model has.
size_t item_size(const std::string& dtype);

class TensorFile {
 public:
  // Throws Error, naming the file, if it cannot be read, or if its header is not one or promises
  // what the file does not hold. what: a memory, or weights; mend: what to do then.
  TensorFile(const std::string& path, const std::string& what, const std::string& mend);
  ~TensorFile();
  TensorFile(const TensorFile&) = delete;

  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  // As they follow one another in the file, without gaps.
  std::vector<std::pair<std::string, TensorInfo>> in_order() const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  const std::string& header_hash() const { return hash_; }
  // Bytes of a tensor into `out`. Throws Error if the file has become shorter.
  void read(const TensorInfo& tensor, void* out) const;
  [[noreturn]] void broken(const std::string& why) const;

 private:
  void parse(const std::string& header);

  std::string path_, what_, mend_, hash_;
  int file_ = -1;
  uint64_t size_ = 0, start_ = 0;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

// A file on its way out: it is written beside its name and takes it in the end, or vanishes.
class OutFile {
 public:
  explicit OutFile(const std::string& path);
  ~OutFile();
  void write(const void* data, size_t n);
  void finish();

 private:
  [[noreturn]] void fail(const char* doing);

  std::string path_, part_;
  int file_ = -1;
};

// Header of a file with these tensors, in their order, which get their places.
std::string make_header(std::vector<std::pair<std::string, TensorInfo>>& tensors,
                        const std::map<std::string, std::string>& metadata);

// The whole of a small file. Throws Error if it is not there or larger than `most`.
std::vector<uint8_t> read_file(const std::string& path, uint64_t most);

}  // namespace ahn
