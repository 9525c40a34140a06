#!/usr/bin/env bash
# jax 0.10.2. An entry of the persistent compilation cache that was cut short: a process was killed,
# or the disk was full, while it was written (entries are written in place).
#
# Expected: it is compiled again, and replaced.
# Seen:     it is compiled again in EVERY process, each with a warning: `put` does nothing where a
#           file of that name exists.
#
# Why it matters here: compiled programs are kept for users who did not ask for it. So our cache
# writes an entry whole or not at all, with a digest, and removes one that is damaged
# (fedbilevel.cache).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "numpy>=2"
cat > "$folder/compile.py" <<'PYTHON'
import sys
import warnings

import jax
import numpy as np

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    jax.jit(lambda a: a * 2 + 1)(np.float32(1))
print(f"{len(hits)} read from the cache, {len(told)} warnings: {[str(one.message)[:60] for one in told]}")
PYTHON
export JAX_PLATFORMS=cpu
run() { "$folder/venv/bin/python" "$folder/compile.py" "$folder/cache"; }
run && run
for entry in "$folder"/cache/*-cache; do head -c 500 "$entry" > "$entry.cut" && mv "$entry.cut" "$entry"; done
echo "cut short:"
run && run && run
