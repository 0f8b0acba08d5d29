#!/bin/sh
# Gives Graylog a GELF TCP input for each service, where it has none, and waits until all of them run. Run again, it
# changes nothing. For the shell of Alpine, which has curl and no jq.
set -eu

api=${GRAYLOG_API:-http://localhost:7555/api}
type=org.graylog2.inputs.gelf.tcp.GELFTCPInput

fail() {
    echo "graylog inputs: $*" >&2
    exit 1
}

# call PATH [CURL OPTION..]: the body of the answer, without white space, so that it can be searched as text
call() {
    path=$1
    shift
    # the password goes through stdin: anyone on the machine can read arguments
    answer=$(printf 'user = "admin:%s"\n' "$GRAYLOG_ROOT_PASSWORD" |
        curl -sS --config - --max-time 10 --retry 5 --retry-connrefused --retry-delay "${RETRY_DELAY:-2}" \
            -H 'X-Requested-By: graylog-inputs' -H 'Accept: application/json' -w '\n%{http_code}' "$@" "$api$path") ||
        fail "no answer from $api$path"
    code=${answer##*
}
    body=${answer%
*}
    case $code in
        2??) printf '%s' "$body" | tr -d ' \n\r\t' ;;
        401) fail "admin's password is not GRAYLOG_ROOT_PASSWORD: GRAYLOG_ROOT_PASSWORD_SHA2 must be its hash" ;;
        *) fail "$path answered $code: $body" ;;
    esac
}

# ensure SERVICE PORT
ensure() {
    case $inputs in
        *"\"title\":\"gelf-$1\""*)
            echo "graylog inputs: gelf-$1 is there"
            return
            ;;
    esac
    call /system/inputs -H 'Content-Type: application/json' --data-binary "{
        \"title\": \"gelf-$1\", \"type\": \"$type\", \"global\": true, \"node\": null,
        \"configuration\": {
            \"bind_address\": \"0.0.0.0\", \"port\": $2, \"use_null_delimiter\": true, \"tcp_keepalive\": true,
            \"tls_enable\": false, \"max_message_size\": 2097152, \"decompress_size_limit\": 8388608,
            \"recv_buffer_size\": 1048576, \"number_worker_threads\": 2, \"charset_name\": \"UTF-8\",
            \"override_source\": null
        }
    }" >/dev/null
    echo "graylog inputs: gelf-$1 made, on port $2"
}

# running SERVICE: a state is followed by the input that it is of, whose first field is its title
running() {
    printf '%s' "$states" | grep -q "\"state\":\"RUNNING\"[^}]*\"title\":\"gelf-$1\""
}

inputs=$(call /system/inputs)
ensure checkout 12201
ensure loms 12202
ensure notifications 12203

tries=0
states=$(call /system/inputstates)
until running checkout && running loms && running notifications; do
    tries=$((tries + 1))
    [ "$tries" -le 15 ] || fail "not all of them run: $states"
    sleep "${RETRY_DELAY:-2}"
    states=$(call /system/inputstates)
done
echo "graylog inputs: all run"
