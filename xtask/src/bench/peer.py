"""Runs llama.cpp on one model once, as `cargo xtask bench` runs BareFlow, and prints one JSON object.

It goes through llama-cpp-python's ctypes bindings of llama.h, not through its high-level class, so that what is timed is
llama.cpp: one foreign call per prompt or token (a few microseconds) is all that Python adds.

  ttft_ms      from loading libllama to the first sampled token, with the page cache warm. Starting the interpreter and
               importing Python modules is not counted: a program linked to llama.cpp would not pay for it.
  prefill      the whole prompt in one batch and the first sample; a second time in the same process, so it is warm.
  decode       the steps after that, each one llama_decode and one greedy sample.
  peak_rss     growth of the process's high-water mark since before libllama was loaded.

Everything not set here has llama.cpp's default: mmap, batch sizes, repacking of weights, flash attention "auto".
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
import types
from pathlib import Path

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", type=Path, required=True)
arguments.add_argument("--prompt-file", type=Path, required=True)
arguments.add_argument("--tokens", type=int, required=True, help="tokens to generate; the first comes from the prefill")
arguments.add_argument("--threads", type=int, required=True)
arguments.add_argument("--context", type=int, required=True)
args = arguments.parse_args()


def high_water_mib():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    sys.exit("/proc/self/status has no VmHWM")


def check(result, what):
    if not result:
        sys.exit(f"{what} failed; run with the model on its own to see llama.cpp's log")
    return result


prompt_bytes = args.prompt_file.read_bytes()
rss_before_mib = high_water_mib()

# The library alone, and the clock stopped while Python builds its wrappers around it. The package's own __init__ is left
# out: it would import the high-level class and all that it needs.
package = types.ModuleType("llama_cpp")
package.__path__ = importlib.util.find_spec("llama_cpp").submodule_search_locations
start = time.perf_counter()
ctypes.CDLL(str(Path(package.__path__[0]) / "lib" / "libllama.so"))
load_library_s = time.perf_counter() - start
sys.modules["llama_cpp"] = package
from llama_cpp import llama_cpp as llama  # noqa: E402


@llama.llama_log_callback
def only_errors(level, text, _user_data):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


llama.llama_log_set(only_errors, ctypes.c_void_p(0))

start = time.perf_counter()
llama.llama_backend_init()
model = check(
    llama.llama_model_load_from_file(str(args.model).encode(), llama.llama_model_default_params()), "loading the model"
)
parameters = llama.llama_context_default_params()
parameters.n_ctx = args.context
parameters.n_threads = args.threads
parameters.n_threads_batch = args.threads
context = check(llama.llama_init_from_model(model, parameters), "making a context")
vocab = llama.llama_model_get_vocab(model)
sampler = llama.llama_sampler_init_greedy()

room = (llama.llama_token * args.context)()
# No BOS and no special tokens, as BareFlow encodes a plain prompt for this model.
n_prompt = llama.llama_tokenize(vocab, prompt_bytes, len(prompt_bytes), room, args.context, False, False)
if n_prompt <= 0:
    sys.exit(f"the prompt does not fit the context of {args.context} tokens")
prompt = (llama.llama_token * n_prompt)(*room[:n_prompt])
one = (llama.llama_token * 1)()


def step(tokens, count):
    """One batch and one greedy sample."""
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, count)) != 0:
        sys.exit("llama_decode failed")
    return llama.llama_sampler_sample(sampler, context, -1)


step(prompt, n_prompt)
ttft_s = load_library_s + time.perf_counter() - start

# One decode step more, then everything again from the start: measured warm.
one[0] = prompt[0]
step(one, 1)
llama.llama_memory_clear(llama.llama_get_memory(context), False)

start = time.perf_counter()
token = step(prompt, n_prompt)
prefill_s = time.perf_counter() - start
ids = [token]
step_s = []
while len(ids) < args.tokens:
    one[0] = token
    start = time.perf_counter()
    token = step(one, 1)
    step_s.append(time.perf_counter() - start)
    ids.append(token)

text = b""
piece = ctypes.create_string_buffer(256)
for token in ids:
    length = llama.llama_token_to_piece(vocab, token, piece, len(piece), 0, False)
    text += piece.raw[: max(0, length)]

json.dump(
    {
        "version": importlib.metadata.version("llama-cpp-python"),
        "system_info": llama.llama_print_system_info().decode(),
        "prompt_tokens": n_prompt,
        "token_ids": ids,
        "text": text.decode(errors="replace"),
        "prefill_tok_s": n_prompt / prefill_s,
        "decode_tok_s": len(step_s) / sum(step_s),
        "token_ms_median": 1e3 * statistics.median(step_s),
        "ttft_ms": 1e3 * ttft_s,
        "peak_rss_mib": high_water_mib() - rss_before_mib,
    },
    sys.stdout,
)
