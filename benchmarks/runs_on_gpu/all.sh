# bash benchmarks/runs_on_gpu/all.sh: every adapter on checkpoints/next, as their commands make them, and how far they go. About 300 s.
# One command: a machine that waits for the next for half a minute is given back, with all that is on it. Wheels are in .whl.
P=${PYTHON:-python3}; T=${TMP_OUT:-/tmp}; B=$PWD/checkpoints/next
test ! -d .whl || $P -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
export PYTHONPATH=/tmp/site PYTHONWARNINGS=ignore
$P benchmarks/runs_on_gpu/examples.py $T/eval.pt ${SHARE:-1} > $T/examples.log 2>&1 &
one() { name=$1; shift; timeout ${LIMIT:-330} $P benchmarks/gpu.py adapters --base $B --out $T/q/$name $MORE "$@" > $T/$name.log 2>&1 || tail -3 $T/$name.log; }
one d1 --task dp --seeds 0 1 2 --workers 4 &
one a1 --task addition --seeds 0 1 2 --workers 3 &
one p1 --task parity --seeds 0 1 2 --workers 3 &
one a2 --task addition --method baseline --seeds 0 --workers 1 &
one a3 --task addition --method scratchpad --seeds 0 --workers 1 &
one p2 --task parity --method baseline --seeds 0 --workers 1 &
one p3 --task parity --method scratchpad --seeds 0 --workers 1 &
one d2 --task dp --method baseline --seeds 0 --workers 1 &
one d3 --task dp --method scratchpad --seeds 0 --workers 2 &
wait
for n in d1 a1 p1; do tar cf $OUT/$n.tar -C $T/q $n; done  # at most 16 MiB each
tar cf $OUT/others.tar -C $T/q a2 a3 p2 p3; tar cf $OUT/dp.tar -C $T/q d2 d3
args=""; for x in d1:dp a1:addition p1:parity; do for s in 0 1 2; do
    f=$T/q/${x%:*}; test $s = 0 || f=$f/seed$s; args="$args ${x%:*}-$s=$f/${x#*:}-retuning"; done; done
timeout 90 $P benchmarks/runs_on_gpu/forced.py $B $T/eval.pt $OUT/forced.json $args
tail -qn 1 $T/[apd][123].log; ls -la $OUT
