//! Brokers that can be taken away keep what they have acknowledged.

use std::{path::Path, time::Duration};

use devstack::{
    broker::{Broker, Source},
    kafka::Tools,
};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer as _},
    producer::{FutureProducer, FutureRecord},
};

use crate::test_stack::{DEVSTACK, eventually};

const EVENTS: usize = 50;

#[tokio::test]
async fn the_mock_cluster_comes_back_with_its_log() {
    comes_back_with_its_log(&Source::Mock).await;
}

#[tokio::test]
async fn a_killed_apache_kafka_comes_back_with_its_log() {
    match Tools::find().await {
        Ok(tools) => comes_back_with_its_log(&Source::Own(tools)).await,
        Err(error) => eprintln!("not tested: {error}"),
    }
}

async fn comes_back_with_its_log(source: &Source) {
    let devstack = Path::new(DEVSTACK);
    let mut broker = Broker::start(source, devstack, "unused").await.unwrap();
    let brokers = broker.brokers().join(",");
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("acks", "all")
        // as the services have it: a broker that is back is noticed within a second
        .set("reconnect.backoff.ms", "100")
        .set("reconnect.backoff.max.ms", "1000")
        .set("message.timeout.ms", "30000")
        .create()
        .unwrap();
    let topic = broker.names().0.to_owned();
    let send = async |producer: &FutureProducer| {
        for number in 0..EVENTS {
            let key = number.to_string();
            let record = FutureRecord::to(&topic).key(&key).payload("event");
            producer.send(record, Duration::ZERO).await.unwrap();
        }
    };
    send(&producer).await;
    broker.take_away().await.unwrap();
    let hasty: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("message.timeout.ms", "500")
        .create()
        .unwrap();
    let record = FutureRecord::to(&topic).key("0").payload("event");
    assert!(
        hasty.send(record, Duration::ZERO).await.is_err(),
        "the broker is away"
    );
    broker.bring_back().await.unwrap();
    // the producer that was there before finds the way back by itself
    send(&producer).await;
    eventually("the log holds what was acknowledged", async || {
        ends(&brokers, &topic) == 2 * EVENTS as i64
    })
    .await;
    broker.stop().await.unwrap();
}

/// The sum of the high watermarks; -1 while a partition has no leader.
fn ends(brokers: &str, topic: &str) -> i64 {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()
        .unwrap();
    let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(5));
    let Ok(metadata) = metadata else { return -1 };
    let partitions = metadata.topics()[0].partitions().iter();
    let ends = partitions.map(|partition| {
        let marks = consumer.fetch_watermarks(topic, partition.id(), Duration::from_secs(5));
        marks.map(|(_, high)| high)
    });
    ends.sum::<Result<i64, _>>().unwrap_or(-1)
}
