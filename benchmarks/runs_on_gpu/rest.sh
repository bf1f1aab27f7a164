# second call, while the machine is warm: the other adapters, as their commands
export PYTHONPATH=/tmp/site PYTHONWARNINGS=ignore
one() { name=$1; shift; timeout 200 python3 benchmarks/gpu.py adapters --base /tmp/n13 --out /tmp/q "$@" > /tmp/$name.log 2>&1 || tail -3 /tmp/$name.log; }
one a1 --task addition --seeds 0 1 2 --workers 3 &
one p1 --task parity --seeds 0 1 2 --workers 3 &
one a2 --task addition --method baseline --seeds 0 --workers 1 &
one a3 --task addition --method scratchpad --seeds 0 --workers 1 &
one p2 --task parity --method baseline --seeds 0 --workers 1 &
one p3 --task parity --method scratchpad --seeds 0 --workers 1 &
one d2 --task dp --method baseline --seeds 0 --workers 1 &
one d3 --task dp --method scratchpad --seeds 0 --workers 2 &
wait
timeout 60 python3 benchmarks/runs_on_gpu/forced.py /tmp/n13 /tmp/eval.pt $OUT/forced2.json a0=/tmp/q/addition-retuning a1=/tmp/q/seed1/addition-retuning p0=/tmp/q/parity-retuning p1=/tmp/q/seed1/parity-retuning p2=/tmp/q/seed2/parity-retuning
cd /tmp/q; tar cf $OUT/q1.tar addition-* ; tar cf $OUT/q2.tar parity-*; tar cf $OUT/q3.tar dp-*; tar cf $OUT/q4.tar seed1 ; tar cf $OUT/q5.tar seed2; tail -n 2 /tmp/[apd][123].log
