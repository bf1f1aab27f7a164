# bash benchmarks/runs_on_gpu/adapters.sh: dp by re-tuning on that base, in three recipes and three seeds. While the machine is warm.
P=${PYTHON:-python3}; T=${TMP_OUT:-/tmp}
export PYTHONPATH=/tmp/site PYTHONWARNINGS=ignore
one() { name=$1; shift; timeout 200 $P benchmarks/gpu.py adapters --base $T/n13 --out $T/r/$name $MORE "$@" > $T/$name.log 2>&1 || tail -3 $T/$name.log; }
one A --task dp --seeds 0 1 2 --weaken 0.2 --workers 4 &
one B --task dp --seeds 0 1 2 --weaken 0.1 --workers 4 &
one C --task dp --seeds 0 1 2 --weaken 0.2 --replay 0.2 --workers 4 &
wait
args=""; for n in A B C; do args="$args ${n}0=$T/r/$n/dp-retuning ${n}1=$T/r/$n/seed1/dp-retuning ${n}2=$T/r/$n/seed2/dp-retuning"; done
timeout 80 $P benchmarks/runs_on_gpu/forced.py $T/n13 $T/eval.pt $OUT/forced.json $args
tail -n 2 $T/[ABC].log
for n in A B C; do tar cf $OUT/$n.tar -C $T/r $n; done; ls -la $OUT
