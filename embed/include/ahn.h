/* Texts of any length, read by a language model in constant memory: the C library.
 *
 *   ahn_model *model;
 *   ahn_session *session;
 *   if (ahn_model_open("book.ahnmodel", &model) ||
 *       ahn_session_new(model, NULL, &session) ||
 *       ahn_session_read(session, text, length, "a book", NULL, NULL) ||
 *       ahn_session_generate(session, "Who is the captain?", 19, NULL, say, NULL, NULL))
 *     fprintf(stderr, "%s\n", ahn_error());
 *
 * Any thread may call any function. All computing is done by one thread that the library owns;
 * callbacks come on the thread that called. Calls on one session wait for nobody: while one is
 * busy, another gets AHN_BUSY. Texts are UTF-8 with their length in bytes, not ended by zero.
 */
#ifndef AHN_H
#define AHN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define AHN_API __attribute__((visibility("default")))
#else
#define AHN_API
#endif

typedef enum ahn_status {
  AHN_OK = 0,
  AHN_STOPPED = 1,      /* a callback returned false; no error */
  AHN_BAD_ARGUMENT = 2, /* a null pointer, a number out of range */
  AHN_NO_FILE = 3,      /* absent, or cannot be read */
  AHN_DAMAGED = 4,      /* not what it should be, or cut, or changed */
  AHN_OTHER_MLX = 5,    /* exported by another version of MLX */
  AHN_OTHER_DEVICE = 6, /* exported for a device that this machine lacks */
  AHN_OTHER_MODEL = 7,  /* a memory of another model, tokenizer or window */
  AHN_NOT_WRITTEN = 8,  /* no such directory, no permission, not ours to replace */
  AHN_NO_SPACE = 9,     /* the disk is full; nothing was written */
  AHN_NO_MEMORY = 10,
  AHN_BUSY = 11,        /* the session is reading or answering */
  AHN_BAD_TEXT = 12,    /* not UTF-8 */
  AHN_EMPTY = 13,       /* there is nothing to answer */
  AHN_TEMPLATE = 14,    /* the chat template does not allow this */
  AHN_BROKEN = 15,      /* the session was interrupted inside of a step; load or make another */
  AHN_INTERNAL = 16
} ahn_status;

typedef struct ahn_model ahn_model;
typedef struct ahn_session ahn_session;

/* What went wrong in this thread's last call that failed: one line, with what to do. Valid until
 * the thread's next call that fails. */
AHN_API const char *ahn_error(void);

/* Version of the MLX that is linked; models must have been exported by the same. */
AHN_API const char *ahn_mlx_version(void);

/* Of the whole process, in bytes. MLX waits for memory beyond the first limit, and keeps at most
 * the second for reuse. */
AHN_API ahn_status ahn_set_memory_limit(size_t bytes);
AHN_API ahn_status ahn_set_cache_limit(size_t bytes);
AHN_API size_t ahn_memory_in_use(void);

/* Where mlx.metallib is, before anything else is called. On Macs only. */
AHN_API ahn_status ahn_set_metallib(const char *path);

/* A directory that `ahn-mlx export-app` wrote. All of its files are compared with the checksums in
 * its manifest, which find damage, not malice. The model must outlive nothing: sessions keep
 * what they need of it. */
AHN_API ahn_status ahn_model_open(const char *directory, ahn_model **model);
AHN_API void ahn_model_close(ahn_model *model);
/* Its name; valid until it is closed. */
AHN_API const char *ahn_model_name(const ahn_model *model);

/* Token ids of a text in which control tokens are but letters, and back. What is returned is
 * freed with ahn_free. */
AHN_API ahn_status ahn_model_encode(const ahn_model *model, const char *text, size_t length,
                                    int32_t **ids, size_t *count);
AHN_API ahn_status ahn_model_decode(const ahn_model *model, const int32_t *ids, size_t count,
                                    char **text, size_t *length);
AHN_API void ahn_free(void *memory);

typedef struct ahn_session_options {
  const char *instructions; /* system message, ended by zero; NULL: the chat template's own */
  bool plain;               /* continue texts as they are, without the chat template */
} ahn_session_options;

/* options: NULL for all zero. */
AHN_API ahn_status ahn_session_new(ahn_model *model, const ahn_session_options *options,
                                   ahn_session **session);
/* Another session with the same past. It costs nothing until one of them goes on. */
AHN_API ahn_status ahn_session_fork(ahn_session *session, ahn_session **fork);
/* A memory file (.ahn), of this library or of `ahn-mlx digest`. */
AHN_API ahn_status ahn_session_load(ahn_model *model, const char *file, ahn_session **session);
/* By a temporary name; replaces nothing but a memory. */
AHN_API ahn_status ahn_session_save(ahn_session *session, const char *file);
AHN_API void ahn_session_free(ahn_session *session);

/* Tokens read and generated so far; bytes of sinks, window, gates and memory. */
AHN_API size_t ahn_session_tokens(const ahn_session *session);
AHN_API size_t ahn_session_bytes(const ahn_session *session);

/* After each step: tokens read of this text, and how many it has. Return false to stop; the
 * session has then read as much as was said. */
typedef bool (*ahn_progress)(size_t read, size_t total, void *context);

/* Read more of the user's message. name: of the text, for the memory file's list; may be NULL. */
AHN_API ahn_status ahn_session_read(ahn_session *session, const char *text, size_t length,
                                    const char *name, ahn_progress progress, void *context);
AHN_API ahn_status ahn_session_read_ids(ahn_session *session, const int32_t *ids, size_t count,
                                        ahn_progress progress, void *context);

typedef struct ahn_generate_options {
  size_t max_tokens;        /* longest answer; 0 means 256 */
  float temperature;        /* 0 is greedy */
  float top_p;              /* nucleus sampling; 0 or 1: of all tokens */
  uint64_t seed;            /* of sampling */
  const char *const *stops; /* texts that end an answer and are not said, ended by zero */
  size_t stop_count;
  ahn_progress progress;    /* while the question is read, with the same context; may be NULL */
} ahn_generate_options;

typedef enum ahn_finish {
  AHN_FINISH_END = 0,    /* the model ended its answer */
  AHN_FINISH_LENGTH = 1, /* max_tokens */
  AHN_FINISH_STOP = 2,   /* one of the stops */
  AHN_FINISH_CALLER = 3  /* the callback returned false */
} ahn_finish;

/* A piece of the answer, whole characters, not ended by zero. Return false to end the answer
 * there. */
typedef bool (*ahn_piece)(const char *text, size_t length, void *context);

/* Ask, and hear the answer as it comes; question and answer become part of the memory. An empty
 * question continues what was read, or answers the open message. options may be NULL, and so may
 * finish. An error leaves the session as it was, and so does stopping before the answer began. */
AHN_API ahn_status ahn_session_generate(ahn_session *session, const char *question, size_t length,
                                        const ahn_generate_options *options, ahn_piece piece,
                                        void *context, ahn_finish *finish);

#ifdef __cplusplus
}
#endif

#endif
