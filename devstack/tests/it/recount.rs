//! The recount can fail: after a short run without faults something is changed by hand, in a table or in the log, and each
//! time it is found.

use devstack::{
    chaos::{Counts, Kind, recount},
    stack::Stack,
};
use rdkafka::{
    ClientConfig,
    producer::{FutureProducer, FutureRecord},
};
use sqlx::{Connection as _, PgConnection};

use crate::chaos::{carry_out, plan, start};

/// Where, what is done there, and what must then be found.
const CHANGES: [(&str, &str, Kind, &str); 9] = [
    (
        "loms",
        "UPDATE loms.stock SET count = count + 3 WHERE (sku, warehouse_id) IN (SELECT sku, warehouse_id FROM loms.stock LIMIT 1)",
        Kind::Duplicated,
        "delivered,",
    ),
    (
        "loms",
        "UPDATE loms.order_item SET count = count + 1 WHERE order_id = (SELECT min(order_id) FROM loms.write_off)",
        Kind::Wrong,
        "is payed and has sold",
    ),
    (
        "loms",
        "DELETE FROM loms.idempotency_key WHERE user_id = (SELECT max(user_id) FROM loms.idempotency_key)",
        Kind::Lost,
        "the key of order",
    ),
    (
        "loms",
        "UPDATE loms.user_order SET status = 'cancelled' WHERE id = (SELECT max(order_id) FROM loms.write_off)",
        Kind::Lost,
        "was seen payed and is cancelled",
    ),
    (
        "loms",
        "WITH gone AS (DELETE FROM loms.user_order WHERE id = (SELECT min(id) FROM loms.user_order WHERE user_id > 1000000) RETURNING id)
         DELETE FROM loms.order_item WHERE order_id IN (SELECT id FROM gone)",
        Kind::Lost,
        "was acknowledged",
    ),
    (
        "checkout",
        "UPDATE checkout.purchase SET order_id = 999999 WHERE id = (SELECT id FROM checkout.purchase LIMIT 1)",
        Kind::Lost,
        "order 999999 of the purchase",
    ),
    (
        "checkout",
        "UPDATE checkout.purchase_item SET count = count + 100
         WHERE purchase_id = (SELECT id FROM checkout.purchase WHERE outcome = 'made' LIMIT 1)",
        Kind::Duplicated,
        " added ",
    ),
    (
        "notifications",
        "DELETE FROM notifications.message WHERE id = (SELECT min(id) FROM notifications.message)",
        Kind::Lost,
        "is not in Notifications",
    ),
    (
        "notifications",
        "DROP INDEX notifications.message_order_sequence_unique;
         INSERT INTO notifications.message (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset)
         SELECT user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset
         FROM notifications.message ORDER BY id DESC LIMIT 1",
        Kind::Duplicated,
        "is there 2 times",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_changed_by_hand_is_found() {
    let plan = plan(Counts::default(), 3);
    let mut stack = start(&plan).await;
    let (_, ledger) = carry_out(&mut stack, &plan).await;
    for (service, statement, kind, words) in CHANGES {
        let url = stack.database(service).unwrap();
        let mut db = PgConnection::connect(url).await.unwrap();
        sqlx::raw_sql(statement).execute(&mut db).await.unwrap();
        let found = recount(&stack, &ledger).await.unwrap();
        let hit =
            |found: &devstack::chaos::Finding| found.kind == kind && found.what.contains(words);
        assert!(
            found.0.iter().any(hit),
            "{statement}\nis not found, but\n{found:#?}"
        );
    }
    publish_what_never_happened(&stack).await;
    let found = recount(&stack, &ledger).await.unwrap();
    for words in ["was never committed", "1 dead letters"] {
        assert!(
            found.0.iter().any(|found| found.what.contains(words)),
            "{words}: {found:#?}"
        );
    }
    stack.stop().await.expect("the stack stops");
}

/// An event of an order that does not exist, and something that is no event at all among the dead letters.
async fn publish_what_never_happened(stack: &Stack) {
    let (orders, dead_letters, _) = stack.broker().names();
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", stack.broker().brokers().join(","))
        .create()
        .unwrap();
    let event = r#"{"UserId":1,"OrderID":999999,"Status":"new","Message":"m","Sequence":1,"OccurredAt":"2026-01-01T00:00:00Z"}"#;
    for (topic, value) in [(orders, event), (dead_letters, "not an event")] {
        let record = FutureRecord::to(topic).key("999999").payload(value);
        producer
            .send(record, std::time::Duration::from_secs(10))
            .await
            .unwrap();
    }
}
