//! Notifications. Events gather in the topic while the service is away, and are saved when it is back; then histories are
//! shown from a table of a million messages.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use proto::notifications::{
    Date, GetHistoryWithPeriodRequest, notifications_client::NotificationsClient,
};
use rand::Rng as _;
use rdkafka::{
    ClientConfig,
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};
use serde_json::json;
use sqlx::PgConnection;
use tokio::time::Instant;

use super::{
    Plan,
    calls::code,
    measure::{self, Caller, Figures},
    target::{Target, until_none},
};
use crate::postgres::connect;

const USERS: i64 = 10_000;
const MESSAGES: i64 = 1_000_000;
/// Order ids of the events begin beyond those of the messages.
const FIRST_ORDER: i64 = 10_000_000;
/// Of the messages, the events' own are the third of an order.
const EVENTS_OF_AN_ORDER: i64 = 3;
/// Events queued before their reports are awaited.
const CHUNK: i64 = 10_000;
/// From the restart to the last event.
const BOUND: Duration = Duration::from_secs(300);
/// Each look counts what is saved.
const POLL: Duration = Duration::from_millis(250);

/// Saves `plan.prepared` events, then shows a month of random users to `plan.clients` callers.
pub(super) async fn save_and_show(
    plan: &Plan,
    target: &mut Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<Figures> {
    let stack = target
        .stack_mut()
        .context("events need a stack of our own")?;
    let mut db = connect(stack.database("notifications")?).await?;
    fill(&mut db).await?;
    stack.wait_for_consumer().await?;
    stack.parts().0[0].kill().await?;
    let events = plan.prepared as i64;
    let (topic, _, _) = stack.broker().names();
    produce(stack.broker().brokers(), topic, events).await?;
    stack.parts().0[0].start_again().await?;
    let rate = saved(&mut db, events).await?;
    measured.push(("events".into(), events as f64));
    measured.push(("events_saved_per_second".into(), rate));
    stack.wait_ready().await?;
    // what has been saved is being told, and the tables are written back: another load than the one that follows
    let untold =
        "SELECT count(*) FROM notifications.message WHERE told_at IS NULL AND given_up_at IS NULL";
    let told = until_none(&mut db, untold, BOUND).await?;
    measured.push(("all_told_s".into(), told.context("never told")?));
    for statement in ["VACUUM ANALYZE notifications.message", "CHECKPOINT"] {
        sqlx::raw_sql(statement).execute(&mut db).await?;
    }

    let channel = target.channel();
    let call = move |mut caller: Caller| {
        let mut client = NotificationsClient::new(channel(caller.index));
        async move {
            let request = a_month(&mut caller);
            let answer = match client.get_history_with_period(request).await {
                Ok(_) => "OK".to_owned(),
                Err(status) => code(&status),
            };
            (caller, Some(answer))
        }
    };
    measure::run(plan.pace(), plan.span(), 1, call).await
}

/// A hundred messages of each user, spread over the year 2025, told long ago.
async fn fill(db: &mut PgConnection) -> Result<()> {
    sqlx::query(
        "INSERT INTO notifications.message (user_id, order_id, sequence, status, message, created_at,
                                            source_topic, source_partition, source_offset, told_at)
         SELECT 1 + n % $2, 1 + n / 3, 1 + n % 3, (ARRAY['new', 'awaiting payment', 'payed'])[1 + n % 3],
                'Order ' || (1 + n / 3) || ' is paid. We are preparing it.',
                timestamptz '2025-01-01 00:00Z' + interval '1 year' * (n::float8 / $1),
                'filled', 0, n, now()
         FROM generate_series(0, $1 - 1) AS n",
    )
    .bind(MESSAGES)
    .bind(USERS)
    .execute(&mut *db)
    .await
    .context("fill the table of messages")?;
    sqlx::raw_sql("VACUUM ANALYZE notifications.message")
        .execute(db)
        .await?;
    Ok(())
}

async fn produce(brokers: &[String], topic: &str, events: i64) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers.join(","))
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("linger.ms", "20")
        .set("compression.type", "gzip")
        .create()
        .context("prepare a producer")?;
    let mut number = 0;
    while number < events {
        let until = (number + CHUNK).min(events);
        try_join_all((number..until).map(|number| send(&producer, topic, number))).await?;
        number = until;
    }
    Ok(())
}

async fn send(producer: &FutureProducer, topic: &str, number: i64) -> Result<()> {
    let order = FIRST_ORDER + number / EVENTS_OF_AN_ORDER;
    let sequence = number % EVENTS_OF_AN_ORDER;
    let status = ["new", "awaiting payment", "payed"][sequence as usize];
    let event = json!({
        "UserId": 1 + order % USERS,
        "OrderID": order,
        "Status": status,
        "Message": format!("Order {order} is {status}."),
        "Sequence": sequence + 1,
        "OccurredAt": "2026-01-02T10:00:00Z",
    });
    let (key, payload) = (order.to_string(), event.to_string());
    let record = FutureRecord::to(topic).key(&key).payload(&payload);
    let sent = producer.send(record, Timeout::Never).await;
    sent.map_err(|(error, _)| error).context("send an event")?;
    Ok(())
}

/// Events a second, from the first batch that is there to the last: what joining the group takes is not counted.
async fn saved(db: &mut PgConnection, events: i64) -> Result<f64> {
    let by = Instant::now() + BOUND;
    let mut first = None;
    loop {
        let saved: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM notifications.message WHERE order_id >= $1 AND sequence > 0",
        )
        .bind(FIRST_ORDER)
        .fetch_one(&mut *db)
        .await?;
        let now = Instant::now();
        match first {
            None if saved > 0 => first = Some((now, saved)),
            Some((since, before)) if saved >= events => {
                return Ok((saved - before) as f64 / (now - since).as_secs_f64());
            }
            _ => {}
        }
        ensure!(now < by, "{saved} of {events} events were saved");
        tokio::time::sleep(POLL).await;
    }
}

fn a_month(caller: &mut Caller) -> GetHistoryWithPeriodRequest {
    let month = caller.random.random_range(1..=12);
    let date = |day| Date {
        year: 2025,
        month,
        day,
    };
    GetHistoryWithPeriodRequest {
        user: caller.random.random_range(1..=USERS),
        from: Some(date(1)),
        to: Some(date(28)),
        ..Default::default()
    }
}
