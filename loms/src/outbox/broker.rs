//! The producer of the relay: sends a batch of events in order and says which of them the broker has.

use std::{
    collections::HashSet,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use platform::{
    config::KafkaConfig,
    error::StartError,
    kafka::{self, Partitioner},
    telemetry,
};
use rdkafka::{
    ClientConfig,
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _, PurgeConfig},
    util::Timeout,
};
use tracing::{Span, field::Empty};

use crate::{crash::CrashPoint, event, store::outbox::OutboxRow};

/// The producer, replaced when it is broken beyond repair.
#[derive(Clone)]
pub(crate) struct Broker {
    brokers: Vec<String>,
    kafka: KafkaConfig,
    producer: Arc<Mutex<FutureProducer>>,
}

impl Broker {
    /// # Errors
    /// A setting that librdkafka refuses; a broker that is away is none.
    pub(crate) fn new(brokers: &[String], kafka: &KafkaConfig) -> Result<Broker, StartError> {
        if brokers.is_empty() {
            return Err(StartError::new(
                "brokers is empty",
                "name at least one host:port",
            ));
        }
        let producer = producer_config(brokers, kafka).create().map_err(|error| {
            StartError::new(
                format!("making the Kafka producer: {error}"),
                "correct brokers",
            )
        })?;
        Ok(Broker {
            brokers: brokers.to_vec(),
            kafka: kafka.clone(),
            producer: Arc::new(Mutex::new(producer)),
        })
    }

    /// What its events are spread over the partitions with.
    pub(super) fn partitioner(&self) -> Partitioner {
        self.kafka.partitioner
    }

    fn producer(&self) -> FutureProducer {
        self.producer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// After a fatal error an idempotent producer refuses everything: only a new one helps.
    fn replace_if_fatal(&self) {
        let Some((code, cause)) = self.producer().client().fatal_error() else {
            return;
        };
        tracing::error!(kafka.code = ?code, error = %cause, "producer failed for good, making a new one");
        match producer_config(&self.brokers, &self.kafka).create() {
            Ok(fresh) => *self.producer.lock().unwrap_or_else(PoisonError::into_inner) = fresh,
            Err(error) => tracing::error!(error = %error, "no new producer"),
        }
    }

    /// `ok`, or what readiness should say about the broker.
    pub(crate) async fn state(&self) -> String {
        let (producer, topic) = (self.producer(), self.kafka.topic.clone());
        let asked = tokio::task::spawn_blocking(move || {
            kafka::topic_state(&producer, &topic, Duration::from_secs(1))
        });
        asked.await.unwrap_or_else(|_| "unknown".into())
    }
}

fn producer_config(brokers: &[String], kafka: &KafkaConfig) -> ClientConfig {
    let mut config = kafka::producer_config(brokers, kafka);
    config.set("partitioner", kafka.partitioner.as_str());
    config
}

/// Sends the rows and returns the ids that may be deleted: all, or per order what precedes its first failure, so that
/// what follows a gap is sent again behind it.
pub(super) async fn send(
    broker: &Broker,
    rows: &[OutboxRow],
    give_up: impl Future<Output = ()>,
) -> (Vec<i64>, Option<String>) {
    let producer = broker.producer();
    let mut give_up = pin!(give_up.fuse());
    let mut failure = None;
    let mut reports: Vec<Option<(DeliveryFuture, Span)>> = Vec::with_capacity(rows.len());
    for row in rows {
        let queued = if failure.is_some() {
            None
        } else {
            enqueue(&producer, &broker.kafka.topic, row, &mut failure)
        };
        reports.push(queued);
    }
    CrashPoint::EventsProduced.pass();
    let mut arrived = Vec::with_capacity(rows.len());
    for report in reports {
        arrived.push(match report {
            None => false,
            Some((report, span)) => {
                let arrived = acknowledged(&producer, report, give_up.as_mut(), &mut failure).await;
                if !arrived {
                    span.record("otel.status_code", "ERROR");
                }
                arrived
            }
        });
    }
    if failure.is_some() {
        broker.replace_if_fatal();
    }
    let mut broken = HashSet::new();
    let mut sent = Vec::with_capacity(rows.len());
    for (row, arrived) in rows.iter().zip(arrived) {
        if !arrived {
            broken.insert(row.order);
        } else if !broken.contains(&row.order) {
            sent.push(row.id);
        }
    }
    (sent, failure)
}

fn enqueue(
    producer: &FutureProducer,
    topic: &str,
    row: &OutboxRow,
    failure: &mut Option<String>,
) -> Option<(DeliveryFuture, Span)> {
    let (key, payload) = (row.order.0.to_string(), event::payload(row));
    let span = sending(topic, row);
    let own = span.in_scope(telemetry::traceparent);
    // a trace that nobody records is passed on as it came
    let traceparent = own.as_deref().filter(|_| !span.is_none());
    let headers = kafka::headers(traceparent.or(row.traceparent.as_deref()));
    let record = FutureRecord::to(topic)
        .key(&key)
        .payload(&payload)
        .headers(headers);
    match producer.send_result(record) {
        Ok(report) => Some((report, span)),
        Err((error, _)) => {
            *failure = Some(format!("queueing an event: {error}"));
            None
        }
    }
}

/// The span of one event on its way, part of the trace of whatever caused it, if that is recorded; the consumer's links to
/// it.
fn sending(topic: &str, row: &OutboxRow) -> Span {
    if !row
        .traceparent
        .as_deref()
        .is_some_and(telemetry::is_sampled)
    {
        return Span::none();
    }
    let span = tracing::info_span!(parent: None, "outbox.send", otel.name = format!("{topic} send"), otel.kind = "producer",
        otel.status_code = Empty, order.id = row.order.0, user.id = row.user, event.sequence = row.sequence);
    if let Some(traceparent) = &row.traceparent {
        telemetry::set_parent(&span, traceparent);
    }
    span
}

/// Waits for one report. The first failure, or the bound, purges what the producer still holds: every other report then
/// comes at once, and nothing is sent behind our back.
async fn acknowledged(
    producer: &FutureProducer,
    mut report: DeliveryFuture,
    give_up: impl Future<Output = ()>,
    failure: &mut Option<String>,
) -> bool {
    let outcome = tokio::select! {
        biased;
        outcome = &mut report => outcome,
        () = give_up => {
            failure.get_or_insert_with(|| "no acknowledgement in time".into());
            purge(producer);
            report.await
        }
    };
    match outcome {
        Ok(Ok(_)) => true,
        Ok(Err((error, _))) => {
            if failure.is_none() {
                *failure = Some(format!("sending an event: {error}"));
                purge(producer);
            }
            false
        }
        Err(_) => {
            failure.get_or_insert_with(|| "the producer went away".into());
            false
        }
    }
}

fn purge(producer: &FutureProducer) {
    producer.purge(PurgeConfig::default().queue().inflight());
    // purged messages report at the next poll
    producer.flush(Timeout::After(Duration::ZERO)).ok();
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rdkafka::mocking::MockCluster;

    use super::*;

    /// Written by Sarama's NewHashPartitioner (v1.38.1, of the system before): 1,000 order ids, and
    /// the partition of each of 12 and of 32.
    const SARAMA: &str = include_str!("sarama_partitions.csv");

    /// The partitions that a topic of so many gives to the keys.
    async fn sent(partitioner: Partitioner, partitions: i32, keys: &[&str]) -> Vec<i32> {
        let cluster = MockCluster::new(1).expect("a mock cluster");
        cluster
            .create_topic("orders", partitions, 1)
            .expect("a topic");
        let kafka = KafkaConfig {
            partitioner,
            ..KafkaConfig::default()
        };
        let broker = Broker::new(&[cluster.bootstrap_servers()], &kafka).expect("a producer");
        let producer = broker.producer();
        let mut reports = Vec::with_capacity(keys.len());
        for key in keys {
            let record = FutureRecord::<str, str>::to("orders")
                .key(key)
                .payload("{}");
            let queued = producer.send_result(record).map_err(|(error, _)| error);
            reports.push(queued.expect("queued"));
        }
        let mut sent = Vec::with_capacity(keys.len());
        for report in reports {
            let report = report.await.expect("reported").map_err(|(error, _)| error);
            sent.push(report.expect("acknowledged").partition);
        }
        sent
    }

    #[tokio::test]
    async fn fnv1a_random_is_saramas_hash_partitioner() {
        let rows: Vec<Vec<&str>> = SARAMA
            .lines()
            .skip(1)
            .map(|row| row.split(',').collect())
            .collect();
        let keys: Vec<&str> = rows.iter().map(|row| row[0]).collect();
        assert_eq!(keys.len(), 1000);
        for (column, partitions) in [(1, 12), (2, 32)] {
            let expected: Vec<i32> = rows
                .iter()
                .map(|row| row[column].parse().expect("a partition"))
                .collect();
            let found = sent(Partitioner::Fnv1aRandom, partitions, &keys).await;
            assert_eq!(found, expected, "of {partitions}");
            let other = sent(Partitioner::ConsistentRandom, partitions, &keys).await;
            assert_ne!(other, expected, "of {partitions}");
            let mut counts: BTreeMap<i32, usize> = BTreeMap::new();
            for partition in found {
                *counts.entry(partition).or_default() += 1;
            }
            assert_eq!(
                counts.len(),
                partitions as usize,
                "every partition has some"
            );
        }
    }
}
