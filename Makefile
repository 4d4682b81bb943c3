# make demo: teacher, distillation and grids on the built-in dataset, on a CPU.   make test: lint and tests.
PYTHON ?= python3
RUN := .venv/bin/python

# Beside another program the threads of a CPU spend their time spinning for one another: 2000 rounds, then they sleep.
export GOMP_SPINCOUNT ?= 2000

.PHONY: help install demo cifar10 pictures test stress lint clean

help:
	@echo "make install   .venv with all that the scripts need: source .venv/bin/activate"
	@echo "make demo      teacher, student and grids on the built-in dataset, minutes on a CPU"
	@echo "make cifar10   the same on CIFAR-10, with distances: hours on a CPU; PRESET=cifar10_gpu for a GPU"
	@echo "make pictures  those of docs/method.md, minutes on a CPU"
	@echo "make test      lint and tests"

.venv/requirements-test.txt: requirements.txt requirements-export.txt
.venv/requirements%: requirements%
	@echo "installing $< into .venv: a download of some GB, minutes"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r $<
	cp $< $@

install: .venv/requirements.txt

# --resume: an interrupted demo goes on where it was, a finished one only samples again.
demo: .venv/requirements.txt
	$(RUN) train0.py --preset demo --run_dir runs/demo/teacher --resume
	$(RUN) train.py --preset demo --teacher runs/demo/teacher --run_dir runs/demo/dmd2 --resume
	$(RUN) sample.py --checkpoint runs/demo/teacher --out runs/demo/teacher.png
	$(RUN) sample.py --checkpoint runs/demo/dmd2 --out runs/demo/student.png
	@echo "teacher, 35 evaluations an image: $(CURDIR)/runs/demo/teacher.png"
	@echo "student, 1 evaluation an image:   $(CURDIR)/runs/demo/student.png"

# The same on CIFAR-10, and distances. DATA="--dataset folder --data_dir DIR" takes other images, PRESET=cifar10_gpu
# the larger network for a GPU.
DATA ?= --dataset cifar10
PRESET ?= cifar10
cifar10: .venv/requirements.txt
	$(RUN) train0.py --preset $(PRESET) $(DATA) --run_dir runs/$(PRESET)/teacher --resume
	$(RUN) train.py --preset $(PRESET) --teacher runs/$(PRESET)/teacher --run_dir runs/$(PRESET)/dmd2 --resume
	$(RUN) sample.py --checkpoint runs/$(PRESET)/teacher --out runs/$(PRESET)/teacher.png
	$(RUN) sample.py --checkpoint runs/$(PRESET)/dmd2 --out runs/$(PRESET)/student.png
	$(RUN) evaluate.py --checkpoint runs/$(PRESET)/teacher --num_images 10000 $(EVALUATE) --out runs/$(PRESET)/teacher.json
	$(RUN) evaluate.py --checkpoint runs/$(PRESET)/dmd2 --num_images 10000 $(EVALUATE) --out runs/$(PRESET)/student.json

# The pictures of docs/method.md.
P := docs/pictures
PLANE := $(RUN) -m tools.plane
pictures: .venv/requirements.txt
	$(RUN) -m tools.gradient --cfg_scale 2 --cfg_interval 0.15 5 --out $(P)/gradient.png --start $(P)/start.png
	$(PLANE) --out $(P)/plane.gif
	$(PLANE) --no-animate --teacher wrong --steps 3500 --fit_steps 300 --gan_steps 1200 --gan_lr 5e-4 --out runs/phases.gif --strip $(P)/phases.png
	$(PLANE) --no-animate --without fake_unet --max_step_percent 0.35 --out $(P)/without_fake.gif
	$(PLANE) --no-animate --guidance_lr 1e-4 --out $(P)/slow_fake.gif
	$(PLANE) --no-animate --min_step_percent 0.6 --out $(P)/high_noise.gif

test: lint
	$(RUN) -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder

# Hours: kills at random moments, an hour of training, every accepted value of every flag.
stress: .venv/requirements-test.txt
	$(RUN) tests/stress/stress.py kills
	$(RUN) tests/stress/stress.py hour
	DMD2_RUNS_PER_FLAG=1000 $(RUN) -m pytest -q tests/test_flags.py

lint: .venv/requirements-test.txt
	$(RUN) -m ruff check .
	$(RUN) -m tools.tables --check

clean:
	rm -rf .venv .pytest_cache .ruff_cache
