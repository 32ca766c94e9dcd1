#!/usr/bin/env bash
# Builds the image and tries it as docker-compose.yml runs it: healthy, not root, a streamed chat,
# Prometheus sees the time to first token, a clean end. `make docker-test`; needs Docker and curl.
#
# BASE_IMAGE and PROMETHEUS_IMAGE replace the images that are pulled, VARIANT is cpu or gpu,
# BUILD_FLAGS goes to `docker build` (such as "--network host"), KEEP=1 leaves the image behind.
set -euo pipefail
cd "$(dirname "$0")/../.."

export COMPOSE_PROJECT_NAME=quire-test-$$ QUIRE_IMAGE=quire:test-$$ VARIANT=${VARIANT:-cpu}
free_port() { python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
PORT=$(free_port) PROMETHEUS_PORT=$(free_port)
export PORT PROMETHEUS_PORT
url=http://127.0.0.1:$PORT
read -ra build_flags <<<"${BUILD_FLAGS:-}"

if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
say() { printf '%s\n' "docker-test: $*"; }
fail() { say "FAILED: $*"; "${compose[@]}" logs --tail 40 || true; exit 1; }
clean_up() {
  "${compose[@]}" down --volumes --timeout 5 >/dev/null 2>&1 || true
  [[ ${KEEP:-} ]] || docker image rm -f "$QUIRE_IMAGE" >/dev/null 2>&1 || true
}
# until_true SECONDS COMMAND...: tries twice a second
until_true() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do ((SECONDS < end)) || return 1; sleep 0.5; done
}
trap clean_up EXIT

say "building $QUIRE_IMAGE ($VARIANT)"
args=(--build-arg "VARIANT=$VARIANT" --build-arg "TORCH_INDEX_URL=${TORCH_INDEX_URL:-}")
[[ ${BASE_IMAGE:-} ]] && args+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
docker build "${build_flags[@]}" "${args[@]}" -t "$QUIRE_IMAGE" . || fail "the build"

say "starting"
"${compose[@]}" up -d --no-build || fail "compose up"
container=$("${compose[@]}" ps -q quire)
healthy() { [[ $(docker inspect -f '{{.State.Health.Status}}' "$container") == healthy ]]; }
until_true 300 healthy || fail "not healthy after 300 s"

say "checking who runs it"
who=$(docker exec "$container" id -u):$(docker exec "$container" id -g)
[[ $who == 10001:0 ]] || fail "runs as $who"

say "streaming a chat"
model=$(curl -fsS "$url/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
body="{\"model\": \"$model\", \"stream\": true, \"max_tokens\": 8, \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}"
stream=$(curl -fsSN --max-time 60 "$url/v1/chat/completions" -H 'Content-Type: application/json' -d "$body") || fail "the chat"
[[ $stream == *'"role":"assistant"'* && $stream == *'data: [DONE]'* ]] || fail "an odd stream: $stream"

say "asking Prometheus"
sees_ttft() {
  curl -fsS "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query?query=vllm:time_to_first_token_seconds_count" 2>/dev/null |
    python3 -c 'import json, sys; r = json.load(sys.stdin)["data"]["result"]; sys.exit(not (r and float(r[0]["value"][1]) > 0))' 2>/dev/null
}
until_true 60 sees_ttft || fail "Prometheus has no vllm:time_to_first_token_seconds_count"

say "stopping"
docker stop -t 30 "$container" >/dev/null
code=$(docker inspect -f '{{.State.ExitCode}}' "$container")
[[ $code == 0 ]] || fail "ended with $code"
say "passed"
