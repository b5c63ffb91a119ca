"""Print llama.cpp's decoding speed after CONTEXT tokens, and the peak memory of the process, as JSON.

python benchmarks/gguf_decode.py MODEL.gguf CONTEXT

quantize.py runs it with a Python that has llama-cpp-python. One thread reads the first 1,024 tokens. Copies of their
keys and values, shifted to later positions, then fill the cache up to CONTEXT, because reading 32,768 tokens with full
attention takes half an hour; memory and work per token are the same.
"""

import ctypes
import json
import resource
import sys
import time

import llama_cpp as llama

READ, BATCH, DECODED = 1024, 512, 48


def main() -> None:
    """Fill the cache, decode and print."""
    path, context = sys.argv[1], int(sys.argv[2])
    llama.llama_log_set(SILENT, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = context + 256, BATCH, BATCH
    params.n_threads = params.n_threads_batch = 1
    params.n_seq_max, params.kv_unified = 2, True
    session = llama.llama_init_from_model(model, params)
    for start in range(0, READ, BATCH):
        decode(session, range(start + 100, start + 100 + BATCH))
    fill(session, context)
    decode(session, [100])  # this also shifts the copies
    begun = time.process_time()
    for i in range(DECODED):
        decode(session, [200 + i])
    rate = DECODED / (time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens per second": rate, "MB": peak / 1e6}))


@llama.llama_log_callback
def SILENT(*_: object) -> None:  # noqa: N802
    """Drop llama.cpp's log."""


def decode(session: object, tokens: object) -> None:
    """Read tokens after those in the cache."""
    ids = list(tokens)
    array = (llama.llama_token * len(ids))(*ids)  # the batch holds a pointer alone
    if llama.llama_decode(session, llama.llama_batch_get_one(array, len(ids))):
        sys.exit("llama_decode failed")


def fill(session: object, context: int) -> None:
    """Extend the cache from READ to `context` tokens with copies of its content."""
    memory, size = llama.llama_get_memory(session), llama.llama_state_seq_get_size(session, 0)
    content = (ctypes.c_uint8 * size)()
    llama.llama_state_seq_get_data(session, content, size, 0)
    for start in range(READ, context, READ):
        if not llama.llama_state_seq_set_data(session, content, size, 1):
            sys.exit("llama_state_seq_set_data failed")
        llama.llama_memory_seq_add(memory, 1, 0, -1, start)
        llama.llama_memory_seq_cp(memory, 1, 0, -1, -1)
        llama.llama_memory_seq_rm(memory, 1, -1, -1)


if __name__ == "__main__":
    main()
