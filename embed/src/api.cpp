// The C functions of ahn.h: arguments checked, exceptions turned into codes and sentences.
#include "ahn.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "error.h"
#include "session.h"
#include "worker.h"
#ifdef __APPLE__
#include <mlx/backend/metal/metal.h>
#endif

using namespace ahn;

struct ahn_model {
  std::shared_ptr<Model> model;
};

struct ahn_session {
  std::unique_ptr<Session> session;
};

namespace {

thread_local std::string last_error;

ahn_status fail(ahn_status status, std::string what) {
  for (char& c : what) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  last_error = std::move(what);
  return status;
}

// What MLX says of memory that is not there has no type of its own.
bool is_memory(const std::string& what) {
  static const char* signs[] = {"allocate", "nsufficient memory", "nsufficient Memory",
                                "ut of memory", "bad_alloc"};
  for (const char* sign : signs) {
    if (what.find(sign) != std::string::npos) return true;
  }
  return false;
}

template <typename F>
ahn_status guarded(F work) {
  try {
    return work();
  } catch (const Error& e) {
    return fail(e.status, e.what());
  } catch (const std::bad_alloc&) {
    return fail(AHN_NO_MEMORY, "not enough memory; use a smaller model or window");
  } catch (const std::exception& e) {
    std::string what = e.what();
    if (is_memory(what)) {
      return fail(AHN_NO_MEMORY, "not enough memory (" + what + "); use a smaller model or window");
    }
    if (what.find("There is no Stream") != what.npos) {
      return fail(AHN_INTERNAL, "another part of this process used MLX first (" + what +
                                    "); open the model before it");
    }
    return fail(AHN_INTERNAL, "MLX could not compute (" + what +
                                  "); export the model again, on a machine like this one");
  } catch (...) {
    return fail(AHN_INTERNAL, "an exception of an unknown kind; open the model again");
  }
}

void need(const void* pointer, const char* name) {
  if (!pointer) throw Error(AHN_BAD_ARGUMENT, std::string(name) + " is NULL");
}

std::string_view view(const char* text, size_t length) {
  if (length > 0) need(text, "text");
  return length ? std::string_view(text, length) : std::string_view();
}

Progress wrap(ahn_progress progress, void* context) {
  if (!progress) return nullptr;
  return [=](size_t read, size_t total) { return progress(read, total, context); };
}

ahn_status give(std::unique_ptr<Session> made, ahn_session** out) {
  *out = new ahn_session{std::move(made)};
  return AHN_OK;
}

}  // namespace

const char* ahn_error(void) { return last_error.c_str(); }

const char* ahn_mlx_version(void) { return mx::version(); }

ahn_status ahn_set_memory_limit(size_t bytes) {
  return guarded([&] { return mx::set_memory_limit(bytes), AHN_OK; });
}

ahn_status ahn_set_cache_limit(size_t bytes) {
  return guarded([&] { return mx::set_cache_limit(bytes), AHN_OK; });
}

size_t ahn_memory_in_use(void) { return mx::get_active_memory() + mx::get_cache_memory(); }

ahn_status ahn_set_metallib(const char* path) {
  return guarded([&] {
    need(path, "path");
#ifdef __APPLE__
    mx::metal::set_metallib_path(path);
    return AHN_OK;
#else
    return fail(AHN_OTHER_DEVICE, "there is no Metal on this machine");
#endif
  });
}

ahn_status ahn_model_open(const char* directory, ahn_model** model) {
  return guarded([&] {
    need(directory, "directory");
    need(model, "model");
    *model = nullptr;
    *model = new ahn_model{std::make_shared<Model>(directory)};
    return AHN_OK;
  });
}

void ahn_model_close(ahn_model* model) { delete model; }

const char* ahn_model_name(const ahn_model* model) {
  return model ? model->model->manifest().name.c_str() : "";
}

ahn_status ahn_model_encode(const ahn_model* model, const char* text, size_t length, int32_t** ids,
                            size_t* count) {
  return guarded([&] {
    need(model, "model");
    need(ids, "ids");
    need(count, "count");
    auto found = model->model->tokenizer().encode({"", view(text, length)});
    *ids = static_cast<int32_t*>(std::malloc(sizeof(int32_t) * (found.size() + 1)));
    if (!*ids) throw std::bad_alloc();
    std::copy(found.begin(), found.end(), *ids);
    *count = found.size();
    return AHN_OK;
  });
}

ahn_status ahn_model_decode(const ahn_model* model, const int32_t* ids, size_t count, char** text,
                            size_t* length) {
  return guarded([&] {
    need(model, "model");
    need(text, "text");
    need(length, "length");
    if (count) need(ids, "ids");
    std::string found = model->model->tokenizer().decode({ids, ids + count});
    *text = static_cast<char*>(std::malloc(found.size() + 1));
    if (!*text) throw std::bad_alloc();
    std::memcpy(*text, found.c_str(), found.size() + 1);
    *length = found.size();
    return AHN_OK;
  });
}

void ahn_free(void* memory) { std::free(memory); }

ahn_status ahn_session_new(ahn_model* model, const ahn_session_options* options,
                           ahn_session** session) {
  return guarded([&] {
    need(model, "model");
    need(session, "session");
    *session = nullptr;
    ahn_session_options chosen = options ? *options : ahn_session_options{};
    const char* said = chosen.instructions ? chosen.instructions : "";
    return give(std::make_unique<Session>(model->model, said, chosen.plain), session);
  });
}

ahn_status ahn_session_fork(ahn_session* session, ahn_session** fork) {
  return guarded([&] {
    need(session, "session");
    need(fork, "fork");
    *fork = nullptr;
    return give(session->session->fork(), fork);
  });
}

ahn_status ahn_session_load(ahn_model* model, const char* file, ahn_session** session) {
  return guarded([&] {
    need(model, "model");
    need(file, "file");
    need(session, "session");
    *session = nullptr;
    return give(Session::load(model->model, file), session);
  });
}

ahn_status ahn_session_save(ahn_session* session, const char* file) {
  return guarded([&] {
    need(session, "session");
    need(file, "file");
    session->session->save(file);
    return AHN_OK;
  });
}

void ahn_session_free(ahn_session* session) { delete session; }

size_t ahn_session_tokens(const ahn_session* session) {
  return session ? session->session->tokens() : 0;
}

size_t ahn_session_bytes(const ahn_session* session) {
  return session ? session->session->bytes() : 0;
}

ahn_status ahn_session_read(ahn_session* session, const char* text, size_t length,
                            const char* name, ahn_progress progress, void* context) {
  return guarded([&] {
    need(session, "session");
    std::string_view called = name ? name : "";
    bool all = session->session->read(view(text, length), called, wrap(progress, context));
    return all ? AHN_OK : AHN_STOPPED;
  });
}

ahn_status ahn_session_read_ids(ahn_session* session, const int32_t* ids, size_t count,
                                ahn_progress progress, void* context) {
  return guarded([&] {
    need(session, "session");
    if (count) need(ids, "ids");
    bool all = session->session->read_ids({ids, ids + count}, wrap(progress, context));
    return all ? AHN_OK : AHN_STOPPED;
  });
}

ahn_status ahn_session_generate(ahn_session* session, const char* question, size_t length,
                                const ahn_generate_options* options, ahn_piece piece,
                                void* context, ahn_finish* finish) {
  return guarded([&] {
    need(session, "session");
    ahn_generate_options o = options ? *options : ahn_generate_options{};
    Sampling sampling;
    if (o.max_tokens) sampling.max_tokens = o.max_tokens;
    sampling.temperature = o.temperature;
    sampling.top_p = o.top_p == 0 ? 1 : o.top_p;
    sampling.seed = o.seed;
    if (o.temperature != 0 && !(o.temperature >= 0.001f && o.temperature <= 1e30f)) {
      throw Error(AHN_BAD_ARGUMENT, "temperature must be 0, which is greedy, or from 0.001 to 1e30");
    }
    if (!(o.top_p >= 0 && o.top_p <= 1)) {
      throw Error(AHN_BAD_ARGUMENT, "top_p must be above 0 and at most 1");
    }
    if (sampling.max_tokens > (size_t{1} << 30)) {
      throw Error(AHN_BAD_ARGUMENT, "max_tokens must be at most 2^30");
    }
    for (size_t i = 0; i < o.stop_count; i++) {
      need(o.stops, "stops");
      need(o.stops[i], "a stop");
      if (!*o.stops[i]) throw Error(AHN_BAD_ARGUMENT, "a stop is empty; leave it out");
      sampling.stops.push_back(o.stops[i]);
    }
    Piece say;
    if (piece) {
      say = [=](std::string_view text) { return piece(text.data(), text.size(), context); };
    }
    auto found = session->session->generate(view(question, length), sampling,
                                            wrap(o.progress, context), say);
    if (found && finish) *finish = *found;
    return found ? AHN_OK : AHN_STOPPED;
  });
}
