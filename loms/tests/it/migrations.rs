//! The schema: each migration is applied to a database that has been at work, again is no change, and every constraint
//! refuses what it is there for.

mod refused;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::json;
use sqlx::{AssertSqlSafe, PgPool};

use self::refused::REFUSED;
use crate::{
    oracle::{self, rows},
    test_app::{TestApp, config, order},
};

/// What a database at that version holds besides what it held before: orders in every status, the units they hold and have
/// sold, a delivery, events that wait and a key. A new table wants its rows here.
const AT_WORK: [(i64, &str); 5] = [
    (
        1,
        "INSERT INTO loms.user_order (id, user_id, status)
         VALUES (1, 1, 'awaiting payment'), (2, 1, 'failed'), (3, 2, 'payed'), (4, 2, 'cancelled');
         SELECT setval('loms.user_order_id_seq', 4);
         INSERT INTO loms.order_item VALUES (1, 7, 2), (1, 8, 1), (2, 9, 5), (3, 7, 1), (4, 8, 1);
         INSERT INTO loms.order_shortage VALUES (2, 9, 5, 0);
         INSERT INTO loms.unpaid_order VALUES (1, now() + interval '1 hour');
         INSERT INTO loms.status_change (order_id, sequence, from_status, to_status, actor)
         VALUES (1, 1, NULL, 'new', 'user'), (1, 2, 'new', 'awaiting payment', 'user'),
                (2, 1, NULL, 'new', 'user'), (2, 2, 'new', 'failed', 'user'),
                (3, 1, NULL, 'new', 'user'), (3, 2, 'new', 'awaiting payment', 'user'),
                (3, 3, 'awaiting payment', 'payed', 'user'),
                (4, 1, NULL, 'new', 'user'), (4, 2, 'new', 'awaiting payment', 'user'),
                (4, 3, 'awaiting payment', 'cancelled', 'timeout')",
    ),
    (
        2,
        r"INSERT INTO loms.delivery (id, content_hash) VALUES ('march', '\x00');
          INSERT INTO loms.delivery_line VALUES ('march', 1, 7, 5), ('march', 2, 7, 1), ('march', 1, 8, 3);
          INSERT INTO loms.stock VALUES (1, 7, 3), (2, 7, 0), (1, 8, 2);
          INSERT INTO loms.reservation_stock VALUES (1, 1, 7, 2), (1, 1, 8, 1);
          INSERT INTO loms.write_off VALUES (3, 2, 7, 1)",
    ),
    (
        3,
        "INSERT INTO loms.outbox (order_id, sequence) SELECT order_id, sequence FROM loms.status_change ORDER BY 1, 2",
    ),
    (
        4,
        r"INSERT INTO loms.idempotency_key
          VALUES (1, 'k', sha256('\x000000000000000100000007000000020000000800000001'), 1)",
    ),
    (
        11,
        "INSERT INTO loms.import (state) VALUES ('declined');
         INSERT INTO loms.import_deficit VALUES (1, 9, 2)",
    ),
];

/// Rows by table, the migrations' own left out.
async fn row_counts(pool: &PgPool) -> BTreeMap<String, i64> {
    let tables: Vec<(String,)> = rows(
        pool,
        "SELECT tablename::text FROM pg_tables
         WHERE schemaname = 'loms' AND tablename <> '_sqlx_migrations'",
    )
    .await;
    let mut counts = BTreeMap::new();
    for (table,) in tables {
        let count = AssertSqlSafe(format!("SELECT count(*) FROM loms.{table}"));
        let count: i64 = sqlx::query_scalar(count)
            .fetch_one(pool)
            .await
            .expect("a count");
        counts.insert(table, count);
    }
    counts
}

/// A database that has been at work since its first version, brought to this one step by step.
async fn migrated_at_work(pool: &PgPool) {
    for migration in loms::MIGRATOR.iter() {
        let (version, before) = (migration.version, row_counts(pool).await);
        let applied = loms::MIGRATOR.run_to(version, pool).await;
        applied.unwrap_or_else(|error| panic!("migration {version}: {error}"));
        let after = row_counts(pool).await;
        for (table, rows) in before {
            assert_eq!(
                after.get(&table),
                Some(&rows),
                "{table} after migration {version}"
            );
        }
        for (_, statements) in AT_WORK.iter().filter(|(at, _)| *at == version) {
            oracle::run(pool, statements).await;
        }
    }
    let empty: Vec<_> = row_counts(pool)
        .await
        .into_iter()
        .filter(|(_, rows)| *rows == 0)
        .collect();
    assert!(
        empty.is_empty(),
        "nothing shows that a migration keeps what is in {empty:?}"
    );
}

#[tokio::test]
async fn each_migration_applies_to_a_database_at_work() {
    let pool = testkit::empty_database("loms").await;
    migrated_at_work(&pool).await;
    // and the service goes on with what was there
    let app = TestApp::start(&pool, json!({})).await;
    let statuses = ["awaiting payment", "failed", "payed", "cancelled"];
    for (id, status) in (1..).zip(statuses) {
        let order = app.list(id).await;
        assert_eq!(
            (order.status.as_str(), order.items.is_empty()),
            (status, false)
        );
    }
    let again = app
        .try_create(order(1, &[(8, 1), (7, 2)], "k"))
        .await
        .unwrap();
    assert_eq!(
        (again.order_id, again.status.as_str()),
        (1, "awaiting payment")
    );
    let next = app.create(1, &[(7, 3)]).await.order_id;
    assert!(next > 4, "{next}");
    app.pay(1).await.unwrap();
    app.cancel(next).await.unwrap();
    assert_eq!(
        (app.stocks(7).await, app.stocks(8).await),
        (vec![(1, 3)], vec![(1, 2)])
    );
    app.finish().await;
}

/// The schema as the catalogue has it, with who wrote each row, and what was applied when.
async fn schema(pool: &PgPool) -> Vec<(String,)> {
    rows(
        pool,
        "SELECT concat_ws(' ', 'relation', relname, oid, relfilenode, xmin) FROM pg_class
         WHERE relnamespace = 'loms'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', 'constraint', conname, oid, xmin) FROM pg_constraint
         WHERE connamespace = 'loms'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', 'type', typname, oid, xmin) FROM pg_type
         WHERE typnamespace = 'loms'::regnamespace
         UNION ALL SELECT m::text FROM loms._sqlx_migrations m
         ORDER BY 1",
    )
    .await
}

#[tokio::test]
async fn to_migrate_again_changes_nothing() {
    let pool = testkit::empty_database("loms").await;
    let config = config(&pool, json!({}));
    // every replica may do it when it starts, all at once
    let migrate = || loms::migrate(&config, Duration::ZERO);
    let (one, other) = tokio::join!(migrate(), migrate());
    one.unwrap();
    other.unwrap();
    let (before, rows) = (schema(&pool).await, row_counts(&pool).await);
    assert!(before.len() > 20, "{before:?}");
    migrate().await.unwrap();
    assert_eq!(schema(&pool).await, before);
    assert_eq!(row_counts(&pool).await, rows);
}

#[tokio::test]
async fn constraints_refuse_what_they_are_there_for() {
    let pool = testkit::empty_database("loms").await;
    migrated_at_work(&pool).await;
    let mut wrong = Vec::new();
    for (constraint, statements) in REFUSED {
        for &statement in statements {
            let done = sqlx::raw_sql(statement).execute(&pool).await;
            let by = done
                .as_ref()
                .err()
                .and_then(|error| error.as_database_error()?.constraint());
            if by != Some(constraint) {
                wrong.push(format!("{statement}: {constraint} expected, {done:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let there: Vec<(String,)> = rows(
        &pool,
        "SELECT conname::text FROM pg_constraint
         WHERE connamespace = 'loms'::regnamespace AND conrelid <> 'loms._sqlx_migrations'::regclass",
    )
    .await;
    let there: BTreeSet<_> = there.into_iter().map(|(name,)| name).collect();
    let shown: BTreeSet<_> = REFUSED.map(|(name, _)| name.to_owned()).into();
    assert_eq!(
        there, shown,
        "every constraint is shown to refuse something"
    );
    let nullable: Vec<(String, String)> = rows(
        &pool,
        "SELECT table_name::text, column_name::text FROM information_schema.columns
         WHERE table_schema = 'loms' AND is_nullable = 'YES' ORDER BY 1, 2",
    )
    .await;
    let nullable: Vec<_> = nullable
        .iter()
        .map(|(table, column)| (table.as_str(), column.as_str()))
        .collect();
    assert_eq!(
        nullable,
        [
            ("import", "through"),
            ("outbox", "traceparent"),
            ("relay", "holder"),
            ("relay", "partitioner"),
            ("status_change", "at"),
            ("status_change", "from_status"),
            ("user_order", "created_at"),
            ("write_off", "at"),
        ]
    );
}
