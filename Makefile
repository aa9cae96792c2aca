# Development commands, also used by CI. Requires Python 3.11 or later and make; grpcurl and ghz require Go 1.24.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PROTOC_VENV := .venv-protoc
TOOLS := .tools
INSTALLED := $(VENV)/.installed
PROTOC_INSTALLED := $(PROTOC_VENV)/.installed
FLOWER_VENV := .venv-flower
FLOWER_OLDEST_VENV := .venv-flower-oldest
FLOWER_INSTALLED := $(FLOWER_VENV)/.installed $(FLOWER_OLDEST_VENV)/.installed
NOTEBOOKS_VENV := .venv-notebooks
NOTEBOOKS_INSTALLED := $(NOTEBOOKS_VENV)/.installed
MOTO_VENV := .venv-moto
MOTO_INSTALLED := $(MOTO_VENV)/.installed
FRAMEWORKS_VENV := .venv-frameworks
FRAMEWORKS_INSTALLED := $(FRAMEWORKS_VENV)/.installed
FLOWER_PYTORCH_VENV := .venv-flower-pytorch
FLOWER_PYTORCH_INSTALLED := $(FLOWER_PYTORCH_VENV)/.installed
AUDIT_VENV := .venv-audit
AUDIT_INSTALLED := $(AUDIT_VENV)/.installed

# Generated code requires at least the generator's protobuf runtime. Keep the generator old.
GRPCIO_TOOLS_VERSION := 1.75.1
MYPY_PROTOBUF_VERSION := 5.1.0
FLOWER_VERSION := 1.42.0
FLOWER_OLDEST_VERSION := 1.40.0
FLOWER_TEMPLATES_VERSION := 1.24.0
NBCLIENT_VERSION := 0.11.0
IPYKERNEL_VERSION := 7.4.0
MOTO_VERSION := 5.2.2
PIP_AUDIT_VERSION := 2.10.1
# The package index of PyTorch's CPU wheels spares several gigabytes of GPU libraries:
# make test-frameworks TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

MESSAGE_PROTOS := $(wildcard protos/qflare/v1/*.proto)
SERVICE_PROTOS := $(wildcard protos/qflare/v1/*_service.proto)
PYTEST_ARGS ?=
# Folders in their order: the files with the longest tests are not the last, so that workers end together.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install install-flower environments tools protos protos-image check-protos format lint lint-deploy type test test-postgres test-s3 test-object-store test-all test-frameworks check \
	audit bench bench-fleet bench-soak demo demo-secure notebooks strategies pictures architecture structure load serve migrate migration build check-wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create the virtual environment with coordinator, device SDK and tools

$(INSTALLED): setup.cfg pyproject.toml .ci/constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit("QFLARE needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[server,dashboard,privacy,device-noise,hsm,oidc,object-store,admin,plot,tensorboard,mlflow,otel,simulation,demo,test,dev]'
	@touch $@

environments: $(INSTALLED) $(PROTOC_INSTALLED) $(FLOWER_INSTALLED) $(NOTEBOOKS_INSTALLED) $(MOTO_INSTALLED) ## create every environment that make check uses; with --jobs side by side

install-flower: $(FLOWER_INSTALLED) ## create the environments with two versions of Flower, for the tests of its apps

# Flower and the device SDK beside it, with packages that conflict with those of $(VENV); the others are shared with it.
# The last release of Flower that contains the templates of `flwr new` is unpacked beside the newest. Jupyter's kernel
# and its client run the notebook on Flower there.
$(FLOWER_VENV)/.installed: $(INSTALLED) Makefile
	$(call install_flower,$(FLOWER_VENV),$(FLOWER_VERSION))
	$(FLOWER_VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(FLOWER_VENV)/templates \
		'flwr==$(FLOWER_TEMPLATES_VERSION)'
	$(call install_jupyter,$(FLOWER_VENV))
	@touch $@

$(FLOWER_OLDEST_VENV)/.installed: $(INSTALLED) Makefile
	$(call install_flower,$(FLOWER_OLDEST_VENV),$(FLOWER_OLDEST_VERSION))
	@touch $@

# $(1): environment, $(2): version of flwr.
define install_flower
$(call share_environment,$(1))
@echo 'pip may now report conflicts with packages of $(VENV), which $(1) does not use'
$(1)/bin/python -m pip install --quiet 'qflare[flower]' 'flwr==$(2)'
endef

# $(1): environment that has the packages of $(2), by default of $(VENV), unless it has other versions itself.
define share_environment
test -x $(1)/bin/python || "$(PYTHON)" -m venv $(1)
@for folder in $(CURDIR)/$(or $(2),$(VENV))/lib/python*/site-packages; do \
	echo "import site; site.addsitedir('$$folder')" >"$(1)/lib/$$(basename "$$(dirname "$$folder")")/site-packages/shared.pth"; \
done
endef

# $(1): environment.
define install_jupyter
$(1)/bin/python -m pip install --quiet 'nbclient==$(NBCLIENT_VERSION)' 'ipykernel==$(IPYKERNEL_VERSION)'
endef

# The notebooks other than that on Flower, whose protobuf is too old for a coordinator.
$(NOTEBOOKS_INSTALLED): $(INSTALLED) Makefile
	$(call share_environment,$(NOTEBOOKS_VENV))
	$(call install_jupyter,$(NOTEBOOKS_VENV))
	@touch $@

# An S3 server for the tests of the payload store `object`. Its dependencies conflict with ours.
$(MOTO_INSTALLED): Makefile
	test -x $(MOTO_VENV)/bin/python || "$(PYTHON)" -m venv $(MOTO_VENV)
	$(MOTO_VENV)/bin/python -m pip install --quiet 'moto[s3,server]==$(MOTO_VERSION)'
	@touch $@

$(FRAMEWORKS_INSTALLED): setup.cfg Makefile
	test -x $(FRAMEWORKS_VENV)/bin/python || "$(PYTHON)" -m venv $(FRAMEWORKS_VENV)
	$(FRAMEWORKS_VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(FRAMEWORKS_VENV)/bin/python -m pip install --quiet --editable \
		'.[server,lightning,transformers,keras,flax,simulation,privacy,ray,tensorboard,test]'
	@touch $@

# Flower beside PyTorch, for the app that `flwr new` writes for it.
$(FLOWER_PYTORCH_INSTALLED): $(FRAMEWORKS_INSTALLED) $(FLOWER_VENV)/.installed Makefile
	$(call share_environment,$(FLOWER_PYTORCH_VENV),$(FRAMEWORKS_VENV))
	$(FLOWER_PYTORCH_VENV)/bin/python -m pip install --quiet 'qflare[flower]' 'flwr==$(FLOWER_VERSION)'
	@touch $@

$(PROTOC_INSTALLED): Makefile
	test -x $(PROTOC_VENV)/bin/python || "$(PYTHON)" -m venv $(PROTOC_VENV)
	$(PROTOC_VENV)/bin/python -m pip install --quiet \
		'grpcio-tools==$(GRPCIO_TOOLS_VERSION)' 'mypy-protobuf==$(MYPY_PROTOBUF_VERSION)' 'setuptools<81'
	@touch $@

$(AUDIT_INSTALLED): Makefile
	test -x $(AUDIT_VENV)/bin/python || "$(PYTHON)" -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet 'pip-audit==$(PIP_AUDIT_VERSION)'
	@touch $@

tools: $(TOOLS)/.grpcurl $(TOOLS)/.ghz $(TOOLS)/.softhsm $(TOOLS)/.promtool $(TOOLS)/.faketime $(TOOLS)/.pgbouncer $(TOOLS)/.chromium $(TOOLS)/.identity-provider ## install grpcurl, ghz, SoftHSM, promtool, libfaketime, PgBouncer, Chromium and an OpenID Connect provider

$(TOOLS)/.grpcurl: .ci/tools/go.mod .ci/tools/go.sum
	$(call go_build,grpcurl,github.com/fullstorydev/grpcurl/cmd/grpcurl)

$(TOOLS)/.ghz: .ci/tools/go.mod .ci/tools/go.sum
	$(call go_build,ghz,github.com/bojand/ghz/cmd/ghz)

$(TOOLS)/.softhsm:
	@mkdir -p $(TOOLS)/softhsm
	@if command -v softhsm2-util >/dev/null; then touch $@; \
	elif cd $(TOOLS)/softhsm && { apt-get download softhsm2 libsofthsm2 \
		|| { apt-get update && apt-get download softhsm2 libsofthsm2; }; } >apt.log 2>&1 \
		&& for package in *.deb; do dpkg-deb -x "$$package" . || exit 1; done; then touch ../.softhsm; \
	else echo '*** SoftHSM is not available: everything that needs a hardware module is LEFT OUT.'; fi

$(TOOLS)/.promtool:
	@mkdir -p $(TOOLS)/prometheus
	@if command -v promtool >/dev/null; then touch $@; \
	elif cd $(TOOLS)/prometheus && { apt-get download prometheus \
		|| { apt-get update && apt-get download prometheus; }; } >apt.log 2>&1 \
		&& dpkg-deb -x prometheus_*.deb . && cp usr/bin/promtool ..; then rm -rf usr lib etc; touch ../.promtool; \
	else echo '*** promtool is not available: checking deploy/prometheus is LEFT OUT.'; fi

# An OpenID Connect provider for tests, with the versions of its lock file.
$(TOOLS)/.identity-provider: tests/support/identity_provider/package-lock.json
	@mkdir -p $(TOOLS)/identity-provider
	@cp tests/support/identity_provider/package.json $< $(TOOLS)/identity-provider
	@if ! command -v node >/dev/null || ! command -v npm >/dev/null; then \
		echo '*** Node.js is not installed: testing log-ins with an identity provider is LEFT OUT.'; \
	elif npm ci --prefix $(TOOLS)/identity-provider --ignore-scripts --no-audit --no-fund --silent; then touch $@; \
	else echo '*** npm ci failed: testing log-ins with an identity provider is LEFT OUT.'; fi

$(TOOLS)/.faketime:
	@mkdir -p $(TOOLS)/faketime
	@if ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1; then touch $@; \
	elif cd $(TOOLS)/faketime && { apt-get download libfaketime \
		|| { apt-get update && apt-get download libfaketime; }; } >apt.log 2>&1 \
		&& dpkg-deb -x libfaketime_*.deb . && cp usr/lib/*/faketime/libfaketimeMT.so.1 ..; then rm -rf usr; touch ../.faketime; \
	else echo '*** libfaketime is not available: tests of wrong clocks are LEFT OUT.'; fi

$(TOOLS)/.pgbouncer:
	@mkdir -p $(TOOLS)/pgbouncer
	@if command -v pgbouncer >/dev/null || test -x /usr/sbin/pgbouncer; then touch $@; \
	elif cd $(TOOLS)/pgbouncer && { $(download_pgbouncer) || { apt-get update && $(download_pgbouncer); }; } >apt.log 2>&1 \
		&& for package in *.deb; do dpkg-deb -x "$$package" . || exit 1; done; then touch ../.pgbouncer; \
	else echo '*** PgBouncer is not available: testing the coordinator behind it is LEFT OUT.'; fi

# Includes a font and the libraries that this machine lacks. Unpacked only, not installed on the system.
$(TOOLS)/.chromium:
	@mkdir -p $(TOOLS)/chromium
	@if for name in chromium-headless-shell chromium chromium-browser google-chrome; do \
		command -v $$name >/dev/null && break; done; then touch $@; \
	elif cd $(TOOLS)/chromium && { $(download_chromium) || { apt-get update && $(download_chromium); }; } >apt.log 2>&1 \
		&& for package in *.deb; do dpkg-deb -x "$$package" . || exit 1; done \
		&& rm -f *.deb; then touch ../.chromium; \
	else echo '*** Chromium is not available: everything that needs a browser is LEFT OUT.'; fi

download_chromium = packages=$$(apt-get --simulate --no-install-recommends install chromium-headless-shell \
	fontconfig-config fonts-inter | awk '$$1 == "Inst" {print $$2}') && test -n "$$packages" && apt-get download $$packages

download_pgbouncer = apt-get download pgbouncer libc-ares2 libevent-2.1-7

# $(1): program, $(2): package. Builds in our own Go module, because its go directive makes TLS offer X25519MLKEM768;
# `go install PACKAGE@VERSION` would use the directive of the program's module. Without Go, reports what is left out.
define go_build
@mkdir -p $(TOOLS)
@if ! command -v go >/dev/null; then \
	echo '*** Go is not installed: everything that needs $(1) is LEFT OUT.'; \
	echo '*** Install Go 1.24 or later from https://go.dev/dl/ and run make again, or add $(1) to the PATH.'; \
elif rm -f $(TOOLS)/$(1) && GOFLAGS= go -C .ci/tools build -trimpath -buildvcs=false -o "$(CURDIR)/$(TOOLS)/$(1)" $(2); then \
	touch $@; \
else \
	echo '*** go build $(2) failed: everything that needs $(1) is LEFT OUT.'; \
fi
endef

# $(1): output folder of the stubs.
define generate
PATH="$(CURDIR)/$(PROTOC_VENV)/bin:$$PATH" python -m grpc_tools.protoc -Iprotos \
	--python_out=$(1) --mypy_out=quiet:$(1) $(MESSAGE_PROTOS)
PATH="$(CURDIR)/$(PROTOC_VENV)/bin:$$PATH" python -m grpc_tools.protoc -Iprotos \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet,only_sync:$(1) $(SERVICE_PROTOS)
endef

protos: $(PROTOC_INSTALLED) ## generate the stubs from protos/qflare/v1/*.proto
	$(call generate,.)

protos-image: $(INSTALLED) ## make the current protos the baseline of buf breaking (see docs/protocol.md)
	$(BIN)/buf build protos --as-file-descriptor-set --exclude-source-info --output protos/qflare.v1.binpb

check-protos: $(PROTOC_INSTALLED) ## fail if the generated stubs are out of date
	@rm -rf build/protos && mkdir -p build/protos
	$(call generate,build/protos)
	@for file in qflare/v1/*_pb2*.py*; do \
		test -e "build/protos/$$file" || { echo "$$file comes from no proto: delete it"; exit 1; }; done
	@for file in build/protos/qflare/v1/*; do \
		diff -u "$${file#build/protos/}" "$$file" || { echo "$${file#build/protos/} is out of date: run make protos"; exit 1; }; done

format: $(INSTALLED) ## format code and protos, apply automatic fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write protos

lint: $(INSTALLED) ## run ruff, buf, import-linter, and the check of names in prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf breaking protos --against protos/qflare.v1.binpb
	$(BIN)/lint-imports
	$(BIN)/python -m tests.structure.stated_names

lint-deploy: $(INSTALLED) $(TOOLS)/.promtool ## lint the files in deploy/
	$(BIN)/hadolint deploy/docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose/*.yaml
	$(BIN)/kubernetes-validate --strict --quiet \
		$(filter-out %/kustomization.yaml,$(wildcard deploy/kubernetes*/*.yaml))
	@mkdir -p build/deploy
	@if command -v kubectl >/dev/null; then \
		for base in kubernetes kubernetes-autoscaling kubernetes-helper; do \
			kubectl kustomize deploy/$$base >build/deploy/$$base.yaml \
			&& $(BIN)/kubernetes-validate --strict --quiet build/deploy/$$base.yaml || exit 1; done; \
	else echo '*** kubectl is not installed: rendering deploy/kubernetes, its autoscaling and the helper is LEFT OUT.'; fi
	@sed 's#/etc/prometheus/#$(CURDIR)/deploy/prometheus/#' deploy/prometheus/prometheus.yaml >build/deploy/prometheus.yaml
	@export PATH="$$PATH:$(CURDIR)/$(TOOLS)"; if command -v promtool >/dev/null; then \
		promtool check config build/deploy/prometheus.yaml \
		&& promtool test rules tests/packaging/alerts.yaml; \
	else echo '*** promtool is not installed: checking deploy/prometheus is LEFT OUT.'; fi
	@if command -v systemd-analyze >/dev/null; then \
		for unit in qflare qflare-helper; do \
			sed 's#/opt/qflare/bin/qflare-.*#/bin/true#' deploy/systemd/$$unit.service >build/deploy/$$unit.service \
			&& systemd-analyze verify build/deploy/$$unit.service \
			&& { systemd-analyze security --offline=true --threshold=20 build/deploy/$$unit.service \
				>build/deploy/exposure.txt || { cat build/deploy/exposure.txt; exit 1; }; } || exit 1; done; \
	else echo '*** systemd-analyze is not installed: checking deploy/systemd is LEFT OUT.'; fi

type: $(INSTALLED) ## run mypy --strict
	$(BIN)/mypy qflare qflare_client qflare_helper qflare_server qflare_simulation migrations tests $(wildcard docs examples)

test: $(INSTALLED) $(FLOWER_INSTALLED) $(NOTEBOOKS_INSTALLED) $(MOTO_INSTALLED) $(TOOLS)/.grpcurl $(TOOLS)/.chromium $(TOOLS)/.identity-provider ## run all tests except the slow ones, on SQLite and PostgreSQL
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-postgres: $(INSTALLED) $(FLOWER_INSTALLED) $(MOTO_INSTALLED) ## run the PostgreSQL tests; PostgreSQL is required
	QFLARE_REQUIRE_ALL=1 $(PYTEST) -k postgresql $(PYTEST_ARGS)

test-s3: $(INSTALLED) ## run the tests of payload stores against QFLARE_TEST_S3_URL, an S3 endpoint with the bucket qflare-tests
	@test -n "$(QFLARE_TEST_S3_URL)" || { echo 'usage: make test-s3 QFLARE_TEST_S3_URL=http://127.0.0.1:8333'; exit 2; }
	QFLARE_TEST_S3_URL=$(QFLARE_TEST_S3_URL) $(BIN)/python -m pytest -k object $(PYTEST_ARGS) \
		tests/contract/storage tests/integration/replicas/test_object_store_processes.py \
		tests/integration/cli/test_backups.py

test-object-store: $(INSTALLED) ## run the contract of payload stores against QFLARE_TEST_OBJECT_STORE_URL, such as gs://BUCKET or az://CONTAINER
	@test -n "$(QFLARE_TEST_OBJECT_STORE_URL)" -a -n "$(QFLARE_TEST_OBJECT_STORE_CREDENTIALS_FILE)" || { \
		echo 'usage: make test-object-store QFLARE_TEST_OBJECT_STORE_URL=az://CONTAINER QFLARE_TEST_OBJECT_STORE_CREDENTIALS_FILE=FILE'; exit 2; }
	QFLARE_TEST_OBJECT_STORE_URL=$(QFLARE_TEST_OBJECT_STORE_URL) QFLARE_REQUIRE_ALL=1 \
	QFLARE_TEST_OBJECT_STORE_CREDENTIALS_FILE=$(QFLARE_TEST_OBJECT_STORE_CREDENTIALS_FILE) \
	QFLARE_TEST_OBJECT_STORE_ENDPOINT=$(QFLARE_TEST_OBJECT_STORE_ENDPOINT) $(BIN)/python -m pytest -k object $(PYTEST_ARGS) \
		tests/contract/storage/test_payload_store.py tests/contract/storage/test_payload_moves.py

test-all: $(INSTALLED) $(FLOWER_INSTALLED) $(NOTEBOOKS_INSTALLED) $(MOTO_INSTALLED) tools ## run all tests with all tools; a skipped test is a failure
	@failed=0; \
	QFLARE_REQUIRE_ALL=1 $(BIN)/python -m pytest -m alone $(PYTEST_ARGS) || failed=1; \
	QFLARE_REQUIRE_ALL=1 $(PYTEST) -m 'not alone' $(PYTEST_ARGS) || failed=1; \
	exit $$failed

# Deprecation warnings of the frameworks change with their releases, which are not pinned.
test-frameworks: $(FRAMEWORKS_INSTALLED) $(FLOWER_PYTORCH_INSTALLED) ## test the adapters and examples of Lightning, Transformers, Keras and Flax, Flower's app for PyTorch, and simulations on Ray; not part of CI
	KERAS_BACKEND=jax $(FRAMEWORKS_VENV)/bin/python -m pytest tests/frameworks -m frameworks -W default $(PYTEST_ARGS)

check: check-protos lint lint-deploy type test-all ## run everything that CI runs

audit: $(AUDIT_INSTALLED) ## check every pinned dependency for known vulnerabilities; needs network access
	$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps --requirement .ci/constraints.txt

bench: $(INSTALLED) ## run the benchmarks and print the table of docs/benchmarks.md
	$(BIN)/python -m tests.bench

bench-fleet: $(INSTALLED) ## simulate a fleet on two coordinators and PostgreSQL; FLEET_ARGS='--devices 1000000'
	$(BIN)/python -m tests.bench.fleet $(FLEET_ARGS)

bench-soak: $(INSTALLED) ## watch a coordinator's memory for an hour of rounds; SOAK_ARGS='--database postgresql'
	$(BIN)/python -m tests.bench.soak $(SOAK_ARGS)

demo: $(INSTALLED) ## ten devices train a model on handwritten digits with a coordinator on SQLite
	$(BIN)/python examples/digits/demo.py

demo-secure: $(INSTALLED) ## the same with secure aggregation: a helper, and two devices that die in the first round
	$(BIN)/python examples/digits/demo_secure.py

notebooks: $(NOTEBOOKS_INSTALLED) $(FLOWER_VENV)/.installed ## run the notebooks of examples/notebooks and write their outputs
	$(NOTEBOOKS_VENV)/bin/python examples/notebooks/execute.py \
		examples/notebooks/digits.ipynb examples/notebooks/robust_and_private.ipynb
	PATH="$(CURDIR)/$(BIN):$$PATH" $(FLOWER_VENV)/bin/python examples/notebooks/execute.py examples/notebooks/flower.ipynb

strategies: $(INSTALLED) ## compare the strategies on handwritten digits; writes docs/strategies.md and its pictures
	PYTHONPATH=examples/digits OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python examples/strategies/compare.py

pictures: $(INSTALLED) tools ## make the pictures in docs/images from training sessions that it runs
	$(BIN)/python examples/digits/demo.py --output build/demo
	cp build/demo/accuracy.png docs/images/demo-accuracy.png
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m docs.make_pictures

architecture: $(INSTALLED) ## generate the pictures and tables of docs/architecture.md from the code
	$(BIN)/python -m docs.make_architecture

structure: $(INSTALLED) ## print component, layer and import counts, and the files on the path of an update
	$(BIN)/python -m tests.structure

load: $(INSTALLED) tools ## run the ghz load tests on SQLite and PostgreSQL
	$(BIN)/python -m tests.load

serve: $(INSTALLED) ## run a coordinator on SQLite in ./qflare-data
	$(BIN)/qflare-server serve

migrate: $(INSTALLED) ## migrate the database of QFLARE_DATABASE_URL to the current schema
	$(BIN)/qflare-server migrate

migration: $(INSTALLED) ## generate the next revision from the models: make migration m="what it does"
	@test -n "$(m)" || { echo 'usage: make migration m="what it does"'; exit 2; }
	@mkdir -p build && rm -f build/migration.db*
	@export QFLARE_DATABASE_URL="sqlite:///$(CURDIR)/build/migration.db" PATH="$(CURDIR)/$(BIN):$$PATH"; \
	number=$$(printf %04d $$(($$(ls migrations/versions/rev_*.py | wc -l) + 1))); \
	alembic upgrade head && alembic revision --autogenerate --rev-id $$number -m "$(m)"

build: $(INSTALLED) ## build the source distribution and the wheel in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist

check-wheel: $(INSTALLED) ## build, install in a clean environment, and test
	QFLARE_REQUIRE_ALL=1 $(PYTEST) tests/packaging $(PYTEST_ARGS)

clean: ## delete generated files and environments
	rm -rf build dist *.egg-info $(VENV) $(PROTOC_VENV) $(FLOWER_VENV) $(FLOWER_OLDEST_VENV) $(NOTEBOOKS_VENV) $(MOTO_VENV) $(FRAMEWORKS_VENV) $(AUDIT_VENV) $(TOOLS) .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
