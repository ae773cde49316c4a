/* Reads texts of any length in constant memory and answers: all of ahn.h in one program.
 *
 *   ahn-sample smollm2.ahnmodel --read book.txt --ask "Who is the captain?" --save book.ahn
 *   ahn-sample smollm2.ahnmodel --load book.ahn --ask "How does it end?"
 *
 * Ctrl-C stops reading, or the answer, and keeps what there is.
 */
#include <errno.h>
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

static int fail_about(const char *which, const char *what) {
  fprintf(stderr, "error: %s: %s\n", which, what);
  return 2;
}

/* The whole of a file; NULL if it cannot be read, and errno says why. */
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
        errno = ENOMEM;
        return NULL;
      }
      text = larger;
    }
    got = fread(text + n, 1, room - n, f);
    n += got;
  } while (got > 0);
  int why = ferror(f) ? errno : 0; /* of a directory, say */
  fclose(f);
  if (why) {
    free(text);
    errno = why;
    return NULL;
  }
  *length = n;
  return text;
}

static int read_file(ahn_session *session, const char *file) {
  size_t length;
  char *text = contents(file, &length);
  if (!text) return fail_about(file, strerror(errno));
  const char *slash = strrchr(file, '/');
  struct gauge gauge = {session, slash ? slash + 1 : file};
  ahn_status status =
      ahn_session_read(session, text, length, gauge.name, show_progress, &gauge);
  free(text);
  if (status == AHN_STOPPED) fprintf(stderr, "\nstopped\n");
  interrupted = 0;
  return status == AHN_OK || status == AHN_STOPPED ? 0 : fail_about(file, ahn_error());
}

static int ask(ahn_session *session, const char *question, const ahn_generate_options *options) {
  ahn_status status = ahn_session_generate(session, question, strlen(question), options, say,
                                           NULL, NULL);
  interrupted = 0;
  if (status) return fail(status == AHN_STOPPED ? "stopped" : ahn_error());
  printf("\n");
  return 0;
}

static const char USAGE[] =
    "ahn-sample MODEL.ahnmodel OPTIONS\n"
    "  In the order in which they are given:\n"
    "    --load FILE          go on from a memory, first of all\n"
    "    --read FILE          read a text, UTF-8\n"
    "    --ask QUESTION       answer it\n"
    "    --save FILE          write the memory\n"
    "  For all of them, wherever they stand:\n"
    "    --instructions TEXT  system message\n"
    "    --plain              continue texts, without the chat template\n"
    "    --max-tokens N       longest answer, 100 unless told\n"
    "    --temperature T      0, which is greedy, unless told\n"
    "    --top-p P            nucleus sampling\n"
    "    --seed N             of sampling\n"
    "    --stop TEXT          ends an answer and is not said\n";

struct settings {
  ahn_session_options session;
  ahn_generate_options answer;
  const char *stop, *load;
};

/* A whole number from least on. */
static int whole(const char *option, const char *value, uint64_t least, uint64_t *out) {
  char *end;
  errno = 0;
  unsigned long long n = strtoull(value, &end, 10);
  bool digits = *value >= '0' && *value <= '9';
  if (!digits || *end || errno || n < least) {
    fprintf(stderr, "error: %s: not a whole number from %d on, but %s\n", option, (int)least, value);
    return 2;
  }
  *out = n;
  return 0;
}

static int real(const char *option, const char *value, float *out) {
  char *end;
  *out = strtof(value, &end);
  if (end == value || *end) {
    fprintf(stderr, "error: %s: not a number, but %s\n", option, value);
    return 2;
  }
  return 0;
}

static bool is_action(const char *option) {
  return !strcmp(option, "--read") || !strcmp(option, "--ask") || !strcmp(option, "--save");
}

static void help(const char *option) {
  if (strcmp(option, "--help") && strcmp(option, "-h")) return;
  fputs(USAGE, stdout);
  exit(0);
}

/* All options, before anything is done. */
static int parse(int argc, char **argv, struct settings *s) {
  uint64_t most = 100;
  bool acted = false;
  int code = 0;
  for (int i = 2; i < argc && code == 0; i++) {
    const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    static const char *const known[] = {
        "--load", "--read", "--ask", "--save", "--instructions", "--stop",
        "--max-tokens", "--temperature", "--top-p", "--seed"};
    bool is_known = false;
    help(option);
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
      is_known = is_known || !strcmp(option, known[k]);
    }
    if (!strcmp(option, "--plain")) {
      s->session.plain = true;
      continue;
    }
    if (!is_known) return fail_about(option, "there is no such option; see ahn-sample --help");
    if (!value) return fail_about(option, "lacks its value; see ahn-sample --help");
    i++;
    if (is_action(option)) {
      acted = true;
    } else if (!strcmp(option, "--load")) {
      if (acted || s->load) return fail_about(option, "comes once, before texts and questions");
      s->load = value;
    } else if (!strcmp(option, "--stop")) {
      s->stop = value;
      s->answer.stop_count = 1;
    } else if (!strcmp(option, "--instructions")) {
      s->session.instructions = value;
    } else if (!strcmp(option, "--max-tokens")) {
      code = whole(option, value, 1, &most);
    } else if (!strcmp(option, "--seed")) {
      code = whole(option, value, 0, &s->answer.seed);
    } else {
      code = real(option, value,
                  strcmp(option, "--top-p") ? &s->answer.temperature : &s->answer.top_p);
    }
  }
  if (s->load && (s->session.plain || s->session.instructions)) {
    return fail_about("--load", "a memory has its own; drop --plain and --instructions");
  }
  s->answer.max_tokens = most;
  s->answer.stops = &s->stop;
  return code;
}

static int use(ahn_model *model, int argc, char **argv, const struct settings *s) {
  ahn_session *session;
  if (s->load ? ahn_session_load(model, s->load, &session)
              : ahn_session_new(model, &s->session, &session)) {
    return fail(ahn_error());
  }
  int code = 0;
  for (int i = 2; i < argc && code == 0; i++) {
    const char *option = argv[i];
    if (!strcmp(option, "--plain")) continue;
    const char *value = argv[++i];
    if (!strcmp(option, "--read")) {
      code = read_file(session, value);
    } else if (!strcmp(option, "--ask")) {
      code = ask(session, value, &s->answer);
    } else if (!strcmp(option, "--save")) {
      code = ahn_session_save(session, value) ? fail(ahn_error()) : 0;
    }
  }
  ahn_session_free(session);
  return code;
}

int main(int argc, char **argv) {
  if (argc > 1) help(argv[1]);
  if (argc < 2 || argv[1][0] == '-') {
    return fail("the directory of a model comes first; see ahn-sample --help");
  }
  struct settings settings = {0};
  int code = parse(argc, argv, &settings);
  if (code) return code;
  signal(SIGINT, on_interrupt);
  ahn_model *model;
  if (ahn_model_open(argv[1], &model)) return fail(ahn_error());
  code = use(model, argc, argv, &settings);
  ahn_model_close(model);
  return code;
}
