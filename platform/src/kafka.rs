//! Kafka settings that are promises: what is acknowledged is kept, in order; what is consumed is committed by hand.
//! Trace context travels in the `traceparent` header.

use std::{fmt, time::Duration};

use rdkafka::{
    ClientConfig,
    message::{Header, Headers as _, OwnedHeaders},
    producer::{Producer, ProducerContext},
};
use serde::{Deserialize, Deserializer, de::Error as _};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::config::KafkaConfig;

/// The header that carries the W3C trace context.
pub const TRACEPARENT: &str = "traceparent";

/// Where a consumer begins in a partition that it has never read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// With the first record that is there.
    #[default]
    Earliest,
    /// With the first that comes.
    Latest,
    /// With the first that Kafka has from then on.
    At(OffsetDateTime),
}

impl<'de> Deserialize<'de> for Start {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Start, D::Error> {
        let text = String::deserialize(from)?;
        match text.as_str() {
            "earliest" => Ok(Start::Earliest),
            "latest" => Ok(Start::Latest),
            time => OffsetDateTime::parse(time, &Rfc3339)
                .map(Start::At)
                .map_err(|_| D::Error::custom("write earliest, latest or a time of RFC 3339")),
        }
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Start::Earliest => f.write_str("earliest"),
            Start::Latest => f.write_str("latest"),
            Start::At(time) => f.write_str(&time.format(&Rfc3339).map_err(|_| fmt::Error)?),
        }
    }
}

/// How a producer chooses the partition of a key; librdkafka's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Partitioner {
    /// CRC-32 of the key.
    #[default]
    #[serde(rename = "consistent_random")]
    ConsistentRandom,
    /// FNV-1a of the key, as Sarama's hash partitioner has it.
    #[serde(rename = "fnv1a_random")]
    Fnv1aRandom,
}

impl Partitioner {
    /// As the configuration and librdkafka spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Partitioner::ConsistentRandom => "consistent_random",
            Partitioner::Fnv1aRandom => "fnv1a_random",
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_a_word_or_a_time() {
        for text in ["earliest", "latest", "2026-03-01T10:00:00Z"] {
            let start: Start = serde_json::from_value(text.into()).expect("a start");
            assert_eq!(start.to_string(), text);
        }
        for text in ["", "Latest", "yesterday", "2026-03-01", "1772359200"] {
            let refused = serde_json::from_value::<Start>(text.into());
            let said = refused.expect_err(text).to_string();
            assert!(said.contains("earliest, latest or a time"), "{said}");
        }
    }
}
