# bash benchmarks/runs_on_gpu/rest.sh: the other adapters, as their commands make them. While the machine is warm.
P=${PYTHON:-python3}; T=${TMP_OUT:-/tmp}
export PYTHONPATH=/tmp/site PYTHONWARNINGS=ignore
one() { name=$1; shift; timeout 250 $P benchmarks/gpu.py adapters --base $T/n13 --out $T/q $MORE "$@" > $T/$name.log 2>&1 || tail -3 $T/$name.log; }
one a1 --task addition --seeds 0 1 2 --workers 3 &
one p1 --task parity --seeds 0 1 2 --workers 3 &
one a2 --task addition --method baseline --seeds 0 --workers 1 &
one a3 --task addition --method scratchpad --seeds 0 --workers 1 &
one p2 --task parity --method baseline --seeds 0 --workers 1 &
one p3 --task parity --method scratchpad --seeds 0 --workers 1 &
one d2 --task dp --method baseline --seeds 0 --workers 1 &
one d3 --task dp --method scratchpad --seeds 0 --workers 2 &
wait
q=$T/q; timeout 80 $P benchmarks/runs_on_gpu/forced.py $T/n13 $T/eval.pt $OUT/forced2.json a0=$q/addition-retuning a1=$q/seed1/addition-retuning \
    p0=$q/parity-retuning p1=$q/seed1/parity-retuning p2=$q/seed2/parity-retuning
cd $q; tar cf $OUT/q1.tar addition-*; tar cf $OUT/q2.tar parity-*; tar cf $OUT/q3.tar dp-*; tar cf $OUT/q4.tar seed1; tar cf $OUT/q5.tar seed2
tail -n 2 $T/[apd][123].log
