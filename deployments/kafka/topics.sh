#!/usr/bin/env bash
# Makes the topics that the services use; none of them ever makes one. What is there stays as it is.
set -euo pipefail

# topic NAME PARTITIONS [--config ..]
topic() {
    local name=$1 partitions=$2
    shift 2
    "${KAFKA_BIN:-/opt/kafka/bin}/kafka-topics.sh" --bootstrap-server "$KAFKA_BROKERS" --create --if-not-exists \
        --topic "$name" --partitions "$partitions" --replication-factor 3 --config min.insync.replicas=2 "$@"
}

topic orders 12
# few, and each waits for a person: kept until somebody has looked
topic orders.dlq 1 --config retention.ms=-1
