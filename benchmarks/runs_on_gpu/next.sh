# bash benchmarks/runs_on_gpu/next.sh: the base. Wheels of what is missing are in .whl. STEPS of the base: 19.4 ms each.
# Steps of a first try that must go well before the rest is begun: TRY.
set -e
P=${PYTHON:-python3}; T=${TMP_OUT:-/tmp}; NEXT=${NEXT:-checkpoints/next}
test ! -d .whl || $P -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
export PYTHONPATH=/tmp/site PYTHONWARNINGS=ignore
($P benchmarks/runs_on_gpu/examples.py $T/eval.pt ${SHARE:-1} > $T/examples.log 2>&1 || echo EXAMPLES FAILED) &
$P benchmarks/gpu.py adapters --task dp --seeds 0 1 2 --steps ${TRY:-100} --base $NEXT --out $T/try > $T/try.log 2>&1 & A=$!
$P benchmarks/gpu.py base --preset base6 --base $NEXT --steps ${TRY:-100} --out $T/tried > $T/tried.log 2>&1 || { tail -5 $T/tried.log; exit 1; }
wait $A || { tail -5 $T/try.log; exit 1; }
tr '\r' '\n' < $T/try.log | tail -7; tr '\r' '\n' < $T/tried.log | tail -4
awk '/^validation/ {if ($3 > .02) exit 1}' $T/tried.log || { echo THE BASE IS BROKEN; exit 1; }
awk '/^loss/ {if ($2 > .5) exit 1}' $T/try.log || { echo ADAPTERS ARE NOT LEARNED; test -n "$SHARE" || exit 1; }
$P benchmarks/gpu.py base --preset base6 --base $NEXT --steps ${STEPS:-15000} --out $T/n13 > $T/base.log 2>&1 || tail -3 $T/base.log
tr '\r' '\n' < $T/base.log | awk 'NR%60==1 || /validation|written|rror/' | tail -12
test -f $T/n13/model.safetensors
tar cf $OUT/n13.tar -C $T n13
wait; ls -la $OUT
