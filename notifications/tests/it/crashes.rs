//! The service as a process that dies under a flow of events: at each named point (before what it saves is committed and
//! after, before its offsets are, after it has sent, before it says so) and by `kill -9` wherever it happens to be. Nothing is
//! lost or saved twice, everything is told at least once.

use std::{collections::HashMap, io::Write as _, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;
use sqlx::PgPool;
use tokio::task::JoinSet;

use crate::{
    kafka::{Kafka, event},
    process::{ConfigFile, Replica, config_of},
    telegram::Telegram,
    test_app::{count, eventually, scaled, seed},
};

/// What an order comes to in the flow.
const STATUSES: [&str; 3] = ["new", "awaiting payment", "payed"];
/// Messages on their way at once, so that the telling keeps up with the saving.
const IN_FLIGHT: usize = 32;
/// Events that the flow is ahead of the telling at most: each life of the service then meets events that come while it runs,
/// and its deaths are spread over the flow.
const AHEAD: usize = 1000;

/// Events that flow while the service dies and is started again.
struct Flow {
    pool: PgPool,
    kafka: Kafka,
    telegram: Telegram,
    events: usize,
    sending: JoinSet<()>,
    /// Of each death how, and how many events were saved by then.
    crashes: Vec<String>,
}

impl Flow {
    async fn start(pool: PgPool) -> Flow {
        let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
        let orders = scaled(10_000).div_ceil(STATUSES.len());
        let mut sending = JoinSet::new();
        sending.spawn(send(pool.clone(), kafka.clone(), orders));
        Flow {
            pool,
            kafka,
            telegram,
            events: orders * STATUSES.len(),
            sending,
            crashes: Vec::new(),
        }
    }

    fn config(&self) -> ConfigFile {
        let changes = json!({
            "kafka": {"session_timeout": self.kafka.shortest_session()},
            "inbox": {"batch": 100},
            "telegram": {"api_key": "123456:the-key", "chat_id": "1", "api_url": self.telegram.url, "timeout": "2s"},
            // what fails on a busy machine is tried again
            "delivery": {"in_flight": IN_FLIGHT, "lease": "4s", "max_attempts": 100},
        });
        config_of(&self.pool, &self.kafka, changes)
    }

    /// After each death: it was in the middle of things.
    async fn crashed(&mut self, how: &str) {
        let saved = count(&self.pool, "true").await;
        self.crashes.push(format!("{how} at {saved}"));
        let told = count(&self.pool, "told_at IS NOT NULL").await;
        assert!(
            (told as usize) < self.events,
            "{how}: nothing flowed any more"
        );
    }

    /// The last life sees to everything that is left; then the books are compared.
    async fn finish(mut self) {
        let config = self.config();
        let last = Replica::start(&config);
        let all = tokio::time::timeout(Duration::from_secs(60), self.sending.join_next()).await;
        let all = all.expect("the service keeps up").expect("it ran");
        all.expect("the whole flow was sent");
        let saved = async || count(&self.pool, "true").await == self.events as i64;
        eventually("every event is saved", saved).await;
        let told = async || count(&self.pool, "told_at IS NOT NULL").await == self.events as i64;
        eventually("every message is told", told).await;
        last.stop();

        let rows =
            "SELECT count(*), count(DISTINCT (order_id, sequence)) FROM notifications.message";
        let rows: (i64, i64) = sqlx::query_as(rows)
            .fetch_one(&self.pool)
            .await
            .expect("two counts");
        let events = self.events as i64;
        assert_eq!(rows, (events, events), "each saved, and saved once");
        assert!(self.kafka.dead_letters(0).is_empty());
        self.check_told().await;
    }

    /// Each at least once, an order's in turn, and no more again than a death and a failed call explain.
    async fn check_told(&self) {
        let texts = self.telegram.texts();
        let mut times: HashMap<&str, usize> = HashMap::new();
        let mut stage: HashMap<&str, usize> = HashMap::new();
        for text in &texts {
            let (order, status) = text.split_once(" is ").expect("as the flow has it");
            let times = times.entry(text).or_default();
            *times += 1;
            if *times == 1 {
                let stage = stage.entry(order).or_default();
                assert_eq!(STATUSES[*stage], status, "{order}: told in turn");
                *stage += 1;
            }
        }
        assert_eq!(times.len(), self.events, "told at least once each");
        let twice = times.values().filter(|times| **times > 1).count();
        let again = texts.len() - times.len();
        let retried = "SELECT coalesce(sum(attempts - 1), 0)::bigint FROM notifications.message";
        let retried: i64 = sqlx::query_scalar(retried)
            .fetch_one(&self.pool)
            .await
            .expect("a sum");
        assert!(
            again <= self.crashes.len() * IN_FLIGHT + retried as usize,
            "{again} told again"
        );
        // not println: the figures are to be seen when all is well, too
        writeln!(
            std::io::stderr(),
            "{} events, deaths by the events saved ({}): 0 lost, 0 saved twice, {twice} sent twice or more \
             ({again} calls too many, {retried} of them after a failed one)",
            self.events,
            self.crashes.join(", "),
        )
        .expect("written");
    }
}

async fn send(pool: PgPool, kafka: Kafka, orders: usize) {
    let orders: Vec<i64> = (1..=orders as i64).collect();
    let mut sent = 0;
    for some in orders.chunks(100) {
        let events = some.iter().flat_map(|order| {
            let of = |(sequence, status): (usize, &&str)| {
                let event = event(
                    7,
                    *order,
                    sequence as i32 + 1,
                    status,
                    "2026-03-01T10:00:00Z",
                );
                (*order, event)
            };
            STATUSES.iter().enumerate().map(of).collect::<Vec<_>>()
        });
        let events: Vec<_> = events.collect();
        kafka.send_all(&events).await;
        sent += events.len();
        while (count(&pool, "told_at IS NOT NULL").await as usize) + AHEAD < sent {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn killed_anywhere() {
    let pool = crate::database().await;
    let mut flow = Flow::start(pool).await;
    let config = flow.config();
    let mut chance = StdRng::seed_from_u64(seed());
    for while_saving in [true, false, false, true] {
        let replica = Replica::start(&config);
        let done = async || {
            if while_saving {
                count(&flow.pool, "true").await as usize
            } else {
                flow.telegram.count()
            }
        };
        let more = done().await + chance.random_range(1..AHEAD);
        eventually("it works", async || done().await >= more).await;
        replica.kill();
        flow.crashed("kill -9").await;
    }
    flow.finish().await;
}

#[cfg(feature = "failpoints")]
#[tokio::test]
async fn aborted_at_each_crash_point() {
    let pool = crate::database().await;
    let mut flow = Flow::start(pool).await;
    let config = flow.config();
    // passed so often before it strikes, each has seen up to 1600 events: a batch is 100 at most, what is marked at once 32
    for (point, passed) in [
        ("events-committing", 15),
        ("events-saved", 15),
        ("offsets-committing", 15),
        ("message-sent", 1500),
        ("messages-marking", 50),
    ] {
        let passed = scaled(passed).max(1);
        let replica = Replica::start_with(&config, &format!("{point}={passed}*off->return"));
        replica.aborted().await;
        flow.crashed(point).await;
    }
    flow.finish().await;
}
