"""Scores a text with llama.cpp as `bareflow perplexity` does, and writes what `bareflow perplexity --logits` writes.

To standard output, little-endian: four u32 (vocabulary, context, windows, index of the first scored position), the tokens
of all windows as u32, then the logits after every scored position, window by window, as f32 rows.

Everything not set here has llama.cpp's default. --exact takes rounding out of what is no product: f32 keys and values, and
attention by plain operations instead of its fused one, which sums values in f16.
"""

import argparse
import ctypes
import importlib.util
import struct
import sys
import types
from pathlib import Path

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", type=Path, required=True)
arguments.add_argument("--text", type=Path, required=True)
arguments.add_argument("--threads", type=int, required=True)
arguments.add_argument("--context", type=int, required=True, help="tokens of a window")
arguments.add_argument("--windows", type=int, required=True, help="windows at most; 0 is all")
arguments.add_argument("--exact", action="store_true")
args = arguments.parse_args()

# The ctypes layer alone: the package's own __init__ would import more than was installed.
package = types.ModuleType("llama_cpp")
package.__path__ = importlib.util.find_spec("llama_cpp").submodule_search_locations
sys.modules["llama_cpp"] = package
from llama_cpp import llama_cpp as llama  # noqa: E402


@llama.llama_log_callback
def only_errors(level, text, _user_data):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def check(result, what):
    if not result:
        sys.exit(f"{what} failed")
    return result


llama.llama_log_set(only_errors, ctypes.c_void_p(0))
llama.llama_backend_init()
model = check(
    llama.llama_model_load_from_file(str(args.model).encode(), llama.llama_model_default_params()), "loading the model"
)
vocab = llama.llama_model_get_vocab(model)
vocab_size = llama.llama_vocab_n_tokens(vocab)

text = args.text.read_bytes()
room = (llama.llama_token * (len(text) + 16))()
n_tokens = llama.llama_tokenize(vocab, text, len(text), room, len(room), True, False)
windows = n_tokens // args.context
if args.windows:
    windows = min(windows, args.windows)
if windows <= 0:
    sys.exit(f"the text is {n_tokens} tokens, less than one window of {args.context}")
tokens = list(room[: windows * args.context])
if llama.llama_vocab_get_add_bos(vocab):
    for window in range(windows):
        tokens[window * args.context] = llama.llama_vocab_bos(vocab)

parameters = llama.llama_context_default_params()
parameters.n_ctx = args.context
parameters.n_batch = args.context
parameters.n_threads = args.threads
parameters.n_threads_batch = args.threads
if args.exact:
    parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
    parameters.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
context = check(llama.llama_init_from_model(model, parameters), "making a context")

first = args.context // 2
out = sys.stdout.buffer
out.write(struct.pack("<4I", vocab_size, args.context, windows, first))
out.write(struct.pack(f"<{len(tokens)}I", *tokens))
batch = llama.llama_batch_init(args.context, 0, 1)
for window in range(windows):
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    # The last token is only a target.
    batch.n_tokens = args.context - 1
    for i in range(batch.n_tokens):
        batch.token[i] = tokens[window * args.context + i]
        batch.pos[i] = i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = i >= first
    if llama.llama_decode(context, batch) != 0:
        sys.exit("llama_decode failed")
    for i in range(first, batch.n_tokens):
        out.write(ctypes.string_at(llama.llama_get_logits_ith(context, i), 4 * vocab_size))
out.flush()
