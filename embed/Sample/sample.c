/* Reads texts of any length in constant memory and answers: all of ahn.h in one program.
 *
 *   ahn-sample smollm2.ahnmodel --read book.txt --ask "Who is the captain?" --save book.ahn
 *   ahn-sample smollm2.ahnmodel --load book.ahn --ask "How does it end?"
 *
 * Ctrl-C stops reading, or the answer, and keeps what there is.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ahn.h"

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal) {
  (void)signal;
  interrupted = 1;
}

struct gauge {
  const ahn_session *session;
  const char *name;
};

/* One line that is written again: how much is read, and how little is held. */
static bool show_progress(size_t read, size_t total, void *context) {
  struct gauge *gauge = context;
  fprintf(stderr, "\r%s: %zu of %zu tokens, memory %.1f MB%s", gauge->name, read, total,
          ahn_session_bytes(gauge->session) / 1e6, read == total ? "\n" : "");
  return !interrupted;
}

static bool say(const char *text, size_t length, void *context) {
  (void)context;
  fwrite(text, 1, length, stdout);
  fflush(stdout);
  return !interrupted;
}

static int fail(const char *what) {
  fprintf(stderr, "error: %s\n", what);
  return 2;
}

/* The whole of a file; NULL if it cannot be read. */
static char *contents(const char *file, size_t *length) {
  FILE *f = fopen(file, "rb");
  if (!f) return NULL;
  char *text = NULL;
  size_t room = 0, n = 0, got;
  do {
    if (n == room) {
      char *larger = realloc(text, room = 2 * room + 65536);
      if (!larger) {
        free(text);
        fclose(f);
        return NULL;
      }
      text = larger;
    }
    got = fread(text + n, 1, room - n, f);
    n += got;
  } while (got > 0);
  fclose(f);
  *length = n;
  return text;
}

static int read_file(ahn_session *session, const char *file) {
  size_t length;
  char *text = contents(file, &length);
  if (!text) return fail("the text cannot be read");
  const char *slash = strrchr(file, '/');
  struct gauge gauge = {session, slash ? slash + 1 : file};
  ahn_status status =
      ahn_session_read(session, text, length, gauge.name, show_progress, &gauge);
  free(text);
  if (status == AHN_STOPPED) fprintf(stderr, "\nstopped\n");
  interrupted = 0;
  return status == AHN_OK || status == AHN_STOPPED ? 0 : fail(ahn_error());
}

static int ask(ahn_session *session, const char *question, const ahn_generate_options *options) {
  ahn_status status = ahn_session_generate(session, question, strlen(question), options, say,
                                           NULL, NULL);
  interrupted = 0;
  if (status) return fail(status == AHN_STOPPED ? "stopped" : ahn_error());
  printf("\n");
  return 0;
}

static int use(ahn_model *model, int argc, char **argv) {
  ahn_session *session = NULL;
  ahn_session_options chosen = {0};
  ahn_generate_options options = {.max_tokens = 100};
  const char *stop;
  int code = 0;
  for (int i = 2; i < argc && code == 0; i++) {
    const char *option = argv[i];
    if (!strcmp(option, "--plain")) {
      chosen.plain = true;
      continue;
    }
    if (++i == argc) {
      code = fail("an option lacks its value");
      break;
    }
    const char *value = argv[i];
    if (!strcmp(option, "--instructions")) {
      chosen.instructions = value;
    } else if (!strcmp(option, "--max-tokens")) {
      options.max_tokens = strtoul(value, NULL, 10);
    } else if (!strcmp(option, "--temperature")) {
      options.temperature = strtof(value, NULL);
    } else if (!strcmp(option, "--top-p")) {
      options.top_p = strtof(value, NULL);
    } else if (!strcmp(option, "--seed")) {
      options.seed = strtoull(value, NULL, 10);
    } else if (!strcmp(option, "--stop")) {
      stop = value;
      options.stops = &stop;
      options.stop_count = 1;
    } else if (!strcmp(option, "--load")) {
      ahn_session_free(session);
      code = ahn_session_load(model, value, &session) ? fail(ahn_error()) : 0;
    } else {
      if (!session && ahn_session_new(model, &chosen, &session)) code = fail(ahn_error());
      if (code) break;
      if (!strcmp(option, "--read")) {
        code = read_file(session, value);
      } else if (!strcmp(option, "--ask")) {
        code = ask(session, value, &options);
      } else if (!strcmp(option, "--save")) {
        code = ahn_session_save(session, value) ? fail(ahn_error()) : 0;
      } else {
        code = fail("an unknown option");
      }
    }
  }
  ahn_session_free(session);
  return code;
}

int main(int argc, char **argv) {
  if (argc < 2) {
    return fail("ahn-sample MODEL.ahnmodel [--instructions TEXT] [--plain] [--load FILE]\n"
                "  [--read FILE] [--max-tokens N] [--temperature T] [--top-p P] [--seed N]\n"
                "  [--stop TEXT] [--ask QUESTION] [--save FILE]");
  }
  signal(SIGINT, on_interrupt);
  ahn_model *model;
  if (ahn_model_open(argv[1], &model)) return fail(ahn_error());
  int code = use(model, argc, argv);
  ahn_model_close(model);
  return code;
}
