//! Kafka settings that are promises: what is acknowledged is kept, in order; what is consumed is committed by hand.
//! Trace context travels in the `traceparent` header.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    message::{Header, Headers as _, OwnedHeaders},
    producer::{Producer, ProducerContext},
};

use crate::config::KafkaConfig;

/// The header that carries the W3C trace context.
pub const TRACEPARENT: &str = "traceparent";

/// An idempotent producer: every replica has it (acks=all), once and in order per key.
pub fn producer_config(brokers: &[String], _kafka: &KafkaConfig) -> ClientConfig {
    let mut config = client_config(brokers);
    config
        .set("acks", "all")
        .set("enable.idempotence", "true")
        // the idempotent producer keeps its order with at most five
        .set("max.in.flight.requests.per.connection", "5")
        // none: a message that times out inside the producer leaves a gap and lets later ones pass; the caller's bound counts
        .set("message.timeout.ms", "0")
        .set("linger.ms", "2")
        // made for speed, and every client reads it
        .set("compression.type", "lz4");
    config
}

/// A member of the group that begins at the earliest offset and commits only when told.
pub fn consumer_config(brokers: &[String], kafka: &KafkaConfig) -> ClientConfig {
    let mut config = client_config(brokers);
    config
        .set("group.id", &kafka.group)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set(
            "session.timeout.ms",
            kafka.session_timeout.as_millis().to_string(),
        )
        .set(
            "heartbeat.interval.ms",
            (kafka.session_timeout.as_millis() / 10)
                .max(100)
                .to_string(),
        );
    config
}

fn client_config(brokers: &[String]) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers.join(","))
        // a broker that is back is noticed within a second
        .set("reconnect.backoff.ms", "100")
        .set("reconnect.backoff.max.ms", "1000")
        // a topic is made by whoever runs the stack, never by a service that misspelt it
        .set("allow.auto.create.topics", "false")
        .set("socket.keepalive.enable", "true");
    config
}

/// The headers of a message, with the trace context of whoever caused it.
pub fn headers(traceparent: Option<&str>) -> OwnedHeaders {
    match traceparent {
        Some(value) => OwnedHeaders::new().insert(Header {
            key: TRACEPARENT,
            value: Some(value),
        }),
        None => OwnedHeaders::new(),
    }
}

/// The trace context of a message, if it has one.
pub fn traceparent<M: rdkafka::Message>(message: &M) -> Option<&str> {
    let headers = message.headers()?;
    let header = headers.iter().find(|header| header.key == TRACEPARENT)?;
    std::str::from_utf8(header.value?).ok()
}

/// `ok`, or what is wrong with a topic as a producer sees it. Blocks up to `timeout`.
pub fn topic_state<C: ProducerContext, P: Producer<C>>(
    producer: &P,
    topic: &str,
    timeout: Duration,
) -> String {
    match producer.client().fetch_metadata(Some(topic), timeout) {
        Ok(metadata) => match metadata.topics().iter().find(|found| found.name() == topic) {
            Some(found) if found.error().is_none() && !found.partitions().is_empty() => "ok".into(),
            _ => format!("topic {topic} is missing"),
        },
        Err(error) => format!("no broker answers: {error}"),
    }
}
