#!/usr/bin/env bash
# Builds the image and tries it as docker-compose.yml runs it: its size, healthy, not root, nothing
# written outside of /cache and /tmp, a streamed chat, Prometheus sees TTFT and TPOT, another user id,
# a running answer survives SIGTERM, a clean end. `make docker-test`; needs Docker and curl.
#
# BASE_IMAGE and PROMETHEUS_IMAGE replace the images that are pulled, VARIANT is cpu or gpu,
# BUILD_FLAGS goes to `docker build` (such as "--network host"), KEEP=1 leaves the image behind.
set -euo pipefail
cd "$(dirname "$0")/../.."

export VARIANT=${VARIANT:-cpu}
export COMPOSE_PROJECT_NAME=quire-test-$$ COMPOSE_PROFILES=$VARIANT
image=quire:test-$$
export QUIRE_IMAGE=$image QUIRE_GPU_IMAGE=$image
free_port() { python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
PORT=$(free_port) PROMETHEUS_PORT=$(free_port)
export PORT PROMETHEUS_PORT
url=http://127.0.0.1:$PORT
largest_cpu_image=1500000000
read -ra build_flags <<<"${BUILD_FLAGS:-}"
work=$(mktemp -d)
stranger=

if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
say() { printf '%s\n' "docker-test: $*"; }
fail() { say "FAILED: $*"; "${compose[@]}" logs --tail 40 || true; exit 1; }
clean_up() {
  [[ -z $stranger ]] || docker rm -f -v "$stranger" >/dev/null 2>&1 || true
  "${compose[@]}" down --volumes --timeout 5 >/dev/null 2>&1 || true
  [[ ${KEEP:-} ]] || docker image rm -f "$image" >/dev/null 2>&1 || true
  rm -rf "$work"
}
# until_true SECONDS COMMAND...: tries twice a second
until_true() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do ((SECONDS < end)) || return 1; sleep 0.5; done
}
healthy() { [[ $(docker inspect -f '{{.State.Health.Status}}' "$1") == healthy ]]; }
# stream URL MODEL MAX_TOKENS: a chat's events, all tokens generated
stream() {
  curl -fsSN --max-time 120 "$1/v1/chat/completions" -H 'Content-Type: application/json' -d \
    "{\"model\": \"$2\", \"stream\": true, \"ignore_eos\": true, \"max_tokens\": $3,
      \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}"
}
complete() { [[ $1 == *'"role":"assistant"'* && $1 == *'"finish_reason":"length"'* && $1 == *'data: [DONE]'* ]]; }
megabytes() { echo "$(($(docker image inspect -f '{{.Size}}' "$1") / 1000000)) MB"; }
trap clean_up EXIT

say "building $VARIANT"
args=(--build-arg "VARIANT=$VARIANT" --build-arg "TORCH_INDEX_URL=${TORCH_INDEX_URL:-}")
[[ ${BASE_IMAGE:-} ]] && args+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
docker build -q "${build_flags[@]}" "${args[@]}" -t "$image" . >/dev/null || fail "the build"
say "size: $(megabytes "$image")${BASE_IMAGE:+, of it $(megabytes "$BASE_IMAGE") $BASE_IMAGE}"
[[ $VARIANT != cpu || $(docker image inspect -f '{{.Size}}' "$image") -le $largest_cpu_image ]] ||
  fail "the image is above $((largest_cpu_image / 1000000)) MB: is TORCH_INDEX_URL an index of CPU builds?"

say "starting with the profile $VARIANT"
"${compose[@]}" up -d --no-build "$VARIANT" prometheus >"$work/up" 2>&1 || { cat "$work/up"; fail "compose up"; }
container=$("${compose[@]}" ps -q "$VARIANT")
began=$SECONDS
until_true 300 healthy "$container" || fail "not healthy after 300 s"
say "healthy after $((SECONDS - began)) s, kernels compiled"

who=$(docker exec "$container" id -u):$(docker exec "$container" id -g)
[[ $who == 10001:0 ]] || fail "runs as $who"
for path in /app/new /opt/venv/new /new; do
  ! docker exec "$container" touch "$path" 2>/dev/null || fail "$path can be written"
done
capabilities=$(docker exec "$container" grep CapEff /proc/1/status)
[[ $capabilities == *0000000000000000 ]] || fail "has capabilities: $capabilities"
say "runs as $who without capabilities on a read-only root"

model=$(curl -fsS "$url/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
now_ms() { echo $(($(date +%s%N) / 1000000)); }
began=$(now_ms)
answer=$(stream "$url" "$model" 32) || fail "the chat"
complete "$answer" || fail "an odd stream: $answer"
pace=$((($(now_ms) - began) / 32 + 1))  # ms per token
say "$model streamed a chat"

sees() {
  curl -fsS "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query?query=$1_count" 2>/dev/null |
    python3 -c 'import json, sys; r = json.load(sys.stdin)["data"]["result"]; sys.exit(not (r and float(r[0]["value"][1]) > 0))' 2>/dev/null
}
for metric in vllm:time_to_first_token_seconds vllm:request_time_per_output_token_seconds; do
  until_true 60 sees $metric || fail "Prometheus has no $metric"
  say "Prometheus has $metric"
done

other_port=$(free_port)
gpus=()
[[ $VARIANT == cpu ]] || gpus=(--gpus all)
stranger=$(docker run -d "${gpus[@]}" --user 1234567:0 --read-only --tmpfs /tmp --cap-drop ALL \
  --security-opt no-new-privileges -e QUIRE_NO_AUTH=1 -p "127.0.0.1:$other_port:8000" "$image" serve embedded)
until_true 300 healthy "$stranger" || { docker logs --tail 40 "$stranger"; fail "another user id: not healthy"; }
answer=$(stream "http://127.0.0.1:$other_port" quire-embedded 16) || fail "another user id: the chat"
complete "$answer" || fail "another user id: an odd stream: $answer"
say "user id 1234567 streamed a chat"
docker rm -f -v "$stranger" >/dev/null
stranger=

tokens=$((8000 / pace < 1500 ? 8000 / pace : 1500))  # about 8 s, so that the signal comes in between
stream "$url" "$model" $tokens >"$work/long" &
running=$!
until_true 30 test -s "$work/long" || fail "the long answer does not begin"
docker stop -t 40 "$container" >/dev/null
wait $running || fail "SIGTERM cut a running answer"
complete "$(<"$work/long")" || fail "SIGTERM cut a running answer: $(tail -c 300 "$work/long")"
code=$(docker inspect -f '{{.State.ExitCode}}' "$container")
[[ $code == 0 ]] || fail "ended with $code"
docker logs "$container" >"$work/log" 2>&1
grep -q "waiting up to" "$work/log" || fail "SIGTERM came when nothing ran any more"
say "SIGTERM: a running answer of $tokens tokens was finished, then the server ended with $code"

"${compose[@]}" down --volumes >"$work/down" 2>&1 || { cat "$work/down"; fail "compose down"; }
[[ -z $("${compose[@]}" ps -q) ]] || fail "something is left"
say "passed"
