# bash benchmarks/runs_on_gpu/all.sh: adapters of re-tuning on checkpoints/next, and how far they go. About 400 s.
# OTHERS=1 bash ...: those of the other methods. (What comes back is 64 MiB at most, 16 MiB a file.)
# One command: a machine that waits for the next for half a minute is given back, with all that is on it. Wheels are in .whl.
P=${PYTHON:-python3}; T=${TMP_OUT:-/tmp}; B=$PWD/checkpoints/next
test ! -d .whl || $P -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
export PYTHONPATH=/tmp/site PYTHONWARNINGS=ignore
one() { name=$1; shift; timeout ${LIMIT:-400} $P benchmarks/gpu.py adapters --base $B --out $T/q/$name $MORE "$@" > $T/$name.log 2>&1 || tail -3 $T/$name.log; }
if test -n "$OTHERS"; then
    for t in addition parity dp; do for m in baseline scratchpad; do one $t-$m --task $t --method $m --seeds 0 --workers 2 & done; done
    wait
    for t in addition parity dp; do tar cf $OUT/others-$t.tar -C $T/q $t-baseline $t-scratchpad; done
    tail -qn 1 $T/*.log; exit
fi
$P benchmarks/runs_on_gpu/examples.py $T/eval.pt ${SHARE:-1} > $T/examples.log 2>&1 &
one d1 --task dp --seeds 0 1 2 --workers 3 &
one d2 --task dp --seeds 0 1 2 --blur 0.25 --workers 3 &
one d3 --task dp --seeds 0 1 --blur 0.25 --steps 5000 --replay 0.4 --workers 3 &
one a1 --task addition --seeds 0 1 2 --workers 3 &
one a2 --task addition --seeds 0 1 --temperature 5 --workers 3 &
one p1 --task parity --seeds 0 1 --workers 2 &
wait
for n in d1 d2 d3 a1 a2 p1; do tar cf $OUT/$n.tar -C $T/q $n; done
args=""; for x in d1:dp d2:dp d3:dp a1:addition a2:addition p1:parity; do for s in 0 1 2; do
    f=$T/q/${x%:*}; test $s = 0 || f=$f/seed$s; test -d $f/${x#*:}-retuning || continue; args="$args ${x%:*}-$s=$f/${x#*:}-retuning"; done; done
timeout 150 $P benchmarks/runs_on_gpu/forced.py $B $T/eval.pt $OUT/forced.json $args
tail -qn 1 $T/[dap][123].log; ls -la $OUT
