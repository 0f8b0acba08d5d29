#!/usr/bin/env bash
# Makes the topics that the services use; none of them ever makes one. What is there stays as it is.
set -euo pipefail

# A broker opens its port before the controllers let it carry replicas: for some seconds there may be fewer than the topics
# need, whatever its health check says.
tries=10

# topic NAME PARTITIONS [--config ..]
topic() {
    local name=$1 partitions=$2 try=1
    shift 2
    until "${KAFKA_BIN:-/opt/kafka/bin}/kafka-topics.sh" --bootstrap-server "$KAFKA_BROKERS" --create --if-not-exists \
        --topic "$name" --partitions "$partitions" --replication-factor 3 --config min.insync.replicas=2 "$@"; do
        if ((try == tries)); then
            echo "topics: $name was not made in $tries tries" >&2
            exit 1
        fi
        try=$((try + 1))
        sleep "${RETRY_DELAY:-2}"
    done
}

topic orders 12
# few, and each waits for a person: kept until somebody has looked
topic orders.dlq 1 --config retention.ms=-1
