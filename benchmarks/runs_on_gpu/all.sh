# bash benchmarks/runs_on_gpu/all.sh: every adapter on checkpoints/next, as their commands make them, and how far they go. About 300 s.
# One command: a machine that waits for the next for half a minute is given back, with all that is on it. Wheels are in .whl.
# Processes that share a GPU get very unequal parts of it: what matters most goes first.
P=${PYTHON:-python3}; T=${TMP_OUT:-/tmp}; B=$PWD/checkpoints/next
test ! -d .whl || $P -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
export PYTHONPATH=/tmp/site PYTHONWARNINGS=ignore OMP_NUM_THREADS=1; mkdir -p $T/q
$P benchmarks/runs_on_gpu/examples.py $T/eval.pt ${SHARE:-1} > $T/examples.log 2>&1 &
one() { name=$1; shift; timeout ${LIMIT:-300} $P benchmarks/gpu.py adapters --base $B --out $T/q/$name $MORE "$@" > $T/$name.log 2>&1 || tail -c 300 $T/$name.log; tar czf $OUT/$name.tgz -C $T/q $name; echo $name $(date +%T); }
one d1 --task dp --seeds 0 1 2 --workers 4 & A=$!
one a5 --task addition --seeds 0 1 2 --workers 3 --temperature 5 & wait $A $!
one a1 --task addition --seeds 0 1 2 --workers 3 &
one p1 --task parity --seeds 0 1 2 --workers 3 &
(for x in "addition baseline" "addition scratchpad" "parity baseline" "parity scratchpad" "dp baseline" "dp scratchpad"; do set -- $x
  timeout ${LIMIT:-300} $P benchmarks/gpu.py adapters --base $B --out $T/q/others $MORE --task $1 --method $2 --seeds 0 --workers 1 > $T/$1-$2.log 2>&1 || tail -c 300 $T/$1-$2.log & done; wait)
(cd $T/q; tar cf - others | gzip -1 | split -b 16600000 - $OUT/others.tgz.) &
wait
args() { for s in 0 1 2; do f=$T/q/$1; test $s = 0 || f=$f/seed$s; test ! -d $f || echo $1-$s=$f/$2-retuning; done; }
forced() { n=$1; shift; timeout 60 $P benchmarks/runs_on_gpu/forced.py $B $T/eval.pt $T/$n.json "$@"; }
forced d $(args d1 dp) > $T/f.d 2>&1 & forced a $(args a1 addition) $(args a5 addition) > $T/f.a 2>&1 & forced p $(args p1 parity) > $T/f.p 2>&1 & wait
cat $T/f.?; tar czf $OUT/logs.tgz -C $T d.json a.json p.json
for f in $T/*.log; do echo $f; tail -c 200 $f | tr '\r' '\n' | grep -v step/s; done; ls -la $OUT
