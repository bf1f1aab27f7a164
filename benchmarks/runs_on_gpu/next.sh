# bash benchmarks/runs_on_gpu/next.sh   (needs .whl and .gpu carried; STEPS of the base: 19.4 ms each)
set -e
ROOT=$PWD; python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
export PYTHONPATH=/tmp/site PYTHONWARNINGS=ignore
(python3 benchmarks/runs_on_gpu/mkeval.py /tmp/eval.pt > /tmp/mkeval.log 2>&1 || echo MKEVAL FAILED) &
python3 benchmarks/gpu.py base --preset base6 --base checkpoints/next --steps ${STEPS:-18000} --out /tmp/n13 2>&1 | tr '\r' '\n' | awk 'NR%20==1 || /validation|written|Error|error/' | tail -40
test -f /tmp/n13/model.safetensors
tar cf $OUT/n13.tar -C /tmp n13
wait
set +e
one() { name=$1; shift; timeout 160 python3 benchmarks/gpu.py adapters --base /tmp/n13 --out /tmp/r/$name "$@" > /tmp/$name.log 2>&1 || tail -3 /tmp/$name.log; }
one A --task dp --seeds 0 1 2 --weaken 0.2 --workers 4 &
one B --task dp --seeds 0 1 2 --weaken 0.1 --workers 4 &
one C --task dp --seeds 0 1 2 --weaken 0.2 --replay 0.2 --workers 4 &
wait
args=""; for n in A B C; do args="$args ${n}0=/tmp/r/$n/dp-retuning ${n}1=/tmp/r/$n/seed1/dp-retuning ${n}2=/tmp/r/$n/seed2/dp-retuning"; done
timeout 80 python3 benchmarks/runs_on_gpu/forced.py /tmp/n13 /tmp/eval.pt $OUT/forced.json $args
tail -2 /tmp/[ABC].log
for n in A B C; do tar cf $OUT/$n.tar -C /tmp/r $n; done; ls -la $OUT
