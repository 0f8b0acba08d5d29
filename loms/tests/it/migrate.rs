//! `loms migrate` beside a service at work: what it leaves is what the released files say, however it got there, and neither
//! an order nor a payment waits for it.
//!
//! `LOMS_TEST_SCALE=20` fills a million orders in before.

use std::{
    process::{ExitStatus, Stdio},
    sync::atomic::{AtomicBool, AtomicI64, Ordering},
    time::{Duration, Instant},
};

use platform::migrate;
use serde_json::json;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, PgConnection, PgPool, SqlSafeStr as _, SqlStr,
    migrate::{Migration, MigrationType, Migrator},
};
use tokio::{
    process::{Child, Command},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    oracle::{self, count, rows},
    process::{self, File, LOMS},
    test_app::{config, eventually, scale},
};

/// Everything that a dump would say of the schema, and what is recorded as applied.
async fn schema(pool: &PgPool) -> Vec<(String,)> {
    rows(
        pool,
        "SELECT concat_ws(' ', 'column', c.oid::regclass, attnum, attname, format_type(atttypid, atttypmod), attnotnull,
                          pg_get_expr(d.adbin, d.adrelid))
         FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND attnum > 0 AND NOT attisdropped
         LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = attnum
         WHERE relnamespace = 'loms'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', 'relation', oid::regclass, relkind, relpersistence, reloptions) FROM pg_class
         WHERE relnamespace = 'loms'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', 'constraint', conrelid::regclass, conname, convalidated, pg_get_constraintdef(oid))
         FROM pg_constraint WHERE connamespace = 'loms'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', 'index', pg_get_indexdef(indexrelid), indisvalid, indisready, indislive, indisreplident)
         FROM pg_index i JOIN pg_class c ON c.oid = indexrelid WHERE relnamespace = 'loms'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', 'sequence', sequencename, data_type, start_value, increment_by, cache_size)
         FROM pg_sequences WHERE schemaname = 'loms'
         UNION ALL
         SELECT concat_ws(' ', 'type', t.typname, enumsortorder, enumlabel)
         FROM pg_type t LEFT JOIN pg_enum e ON e.enumtypid = t.oid WHERE typnamespace = 'loms'::regnamespace
         UNION ALL
         SELECT concat_ws(' ', 'applied', version, description, success, encode(checksum, 'hex')) FROM loms._sqlx_migrations
         ORDER BY 1",
    )
    .await
}

#[tokio::test]
async fn both_ways_lead_to_the_same_schema() {
    let pool = testkit::empty_database("loms").await;
    loms::MIGRATOR.run(&pool).await.unwrap();
    let released = schema(&pool).await;
    assert!(released.len() > 100, "{released:#?}");
    oracle::run(&pool, "DROP SCHEMA loms CASCADE").await;
    let config = config(&pool, json!({}));
    loms::migrate(&config, Duration::ZERO).await.unwrap();
    assert_eq!(schema(&pool).await, released);
    // and the files as they are find nothing left to do
    loms::MIGRATOR.run(&pool).await.unwrap();
    assert_eq!(schema(&pool).await, released);
}

/// A file of a test's own.
fn file(version: i64, sql: &'static str) -> Migration {
    let no_tx = sql.starts_with("-- no-transaction");
    let kind = MigrationType::Simple;
    Migration::new(version, "test".into(), kind, sql.into_sql_str(), no_tx)
}

#[tokio::test]
async fn an_index_that_was_cut_is_built_again() {
    let pool = testkit::empty_database("loms").await;
    let files = || {
        vec![
            file(1, "CREATE TABLE t (a INT); INSERT INTO t VALUES (1), (1)"),
            file(
                2,
                "-- no-transaction\nDROP INDEX CONCURRENTLY IF EXISTS t_a_key",
            ),
            file(
                3,
                "-- no-transaction\nCREATE UNIQUE INDEX CONCURRENTLY t_a_key ON t (a)",
            ),
        ]
    };
    let postgres = config(&pool, json!({})).postgres;
    let migrator = Migrator::with_migrations(files());
    let migrate = || migrate::migrate(&postgres, &migrator, &[], Duration::ZERO);
    // two rows are equal: it ends in the middle, as one does that is killed
    let failed = migrate().await.unwrap_err();
    assert!(format!("{failed:#}").contains("t_a_key"), "{failed:#}");
    let invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid";
    assert_eq!(count(&pool, invalid).await, 1);
    oracle::run(&pool, "DELETE FROM t WHERE ctid = '(0,1)'").await;
    migrate().await.unwrap();
    assert_eq!(count(&pool, invalid).await, 0);
    let applied = "SELECT count(*) FROM _sqlx_migrations WHERE success";
    assert_eq!(count(&pool, applied).await, 3);
    // a release before this one, put back: what it does not know is not its business
    let older = Migrator::with_migrations(files().into_iter().take(2).collect());
    migrate::migrate(&postgres, &older, &[], Duration::ZERO)
        .await
        .unwrap();
    // but a file that is gone from its own is
    let gap = Migrator::with_migrations(files().into_iter().filter(|f| f.version != 2).collect());
    let refused = migrate::migrate(&postgres, &gap, &[], Duration::ZERO).await;
    assert!(format!("{:#}", refused.unwrap_err()).contains("missing"));
}

#[tokio::test]
async fn the_time_outs_are_those_of_the_role() {
    let pool = testkit::empty_database("loms").await;
    let migrate = async |statement: &str| {
        let changes =
            json!({"postgres": {"lock_timeout": "1234ms", "statement_timeout": statement}});
        let config = config(&pool, changes);
        loms::migrate(&config, Duration::ZERO).await.unwrap();
    };
    let settings = async || {
        let mut db: PgConnection = pool.connect_options().connect().await.unwrap();
        let mut shown = Vec::new();
        for name in [
            "lock_timeout",
            "statement_timeout",
            "idle_in_transaction_session_timeout",
        ] {
            let show: SqlStr = AssertSqlSafe(format!("SHOW {name}")).into_sql_str();
            let value: String = sqlx::query_scalar(show).fetch_one(&mut db).await.unwrap();
            shown.push(value);
        }
        shown
    };
    let written = "SELECT (SELECT s.xmin::text::bigint FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
                           WHERE d.datname = current_database())";
    migrate("5s").await;
    assert_eq!(settings().await, ["1234ms", "5s", "5s"]);
    let first = count(&pool, written).await;
    migrate("5s").await;
    assert_eq!(count(&pool, written).await, first, "written again");
    migrate("7s").await;
    assert_eq!(settings().await, ["1234ms", "7s", "5s"]);
}

/// A release's `migrate`, as a process.
fn start_migrate(config: &File) -> Child {
    let mut command = Command::new(LOMS);
    command.args(["migrate", "--config", config.path()]);
    command.stdin(Stdio::null()).kill_on_drop(true);
    command.spawn().expect("it starts")
}

async fn ended(mut child: Child) -> ExitStatus {
    let ended = tokio::time::timeout(Duration::from_secs(600), child.wait()).await;
    ended.expect("an end").expect("it ran")
}

/// Orders of one unit that were payed and whose events were sent, as the first four files have the tables.
async fn fill(pool: &PgPool, orders: usize) {
    let statements = format!(
        "BEGIN;
         INSERT INTO loms.user_order (id, user_id, status) SELECT n, 1 + n % 1000, 'payed' FROM generate_series(1, {orders}) n;
         INSERT INTO loms.order_item SELECT n, 100 + n % 5000, 1 FROM generate_series(1, {orders}) n;
         INSERT INTO loms.write_off SELECT n, 1, 100 + n % 5000, 1 FROM generate_series(1, {orders}) n;
         INSERT INTO loms.status_change (order_id, sequence, from_status, to_status, actor)
         SELECT n, 1, NULL::loms.order_status, 'new'::loms.order_status, 'user' FROM generate_series(1, {orders}) n
         UNION ALL SELECT n, 2, 'new', 'awaiting payment', 'user' FROM generate_series(1, {orders}) n
         UNION ALL SELECT n, 3, 'awaiting payment', 'payed', 'user' FROM generate_series(1, {orders}) n;
         INSERT INTO loms.idempotency_key SELECT 1 + n % 1000, n::text, '', n FROM generate_series(1, {orders}) n;
         INSERT INTO loms.delivery (id, content_hash) VALUES ('filled', '');
         INSERT INTO loms.delivery_line SELECT 'filled', warehouse_id, sku, sum(count) FROM loms.write_off GROUP BY 2, 3;
         INSERT INTO loms.delivery_line SELECT 'filled', 1, sku, 1000000 FROM generate_series(1, {CLIENTS}) sku;
         INSERT INTO loms.stock SELECT 1, sku, 1000000 FROM generate_series(1, {CLIENTS}) sku;
         UPDATE loms.relay SET sent = sent + 3 * {orders};
         COMMIT;"
    );
    let filled = sqlx::raw_sql(AssertSqlSafe(statements)).execute(pool).await;
    filled.expect("orders");
    let admin = testkit::admin(pool).await;
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        oracle::run(&admin, statement).await;
    }
}

const CLIENTS: i64 = 4;

/// What a release at the first four files writes for an order and for a payment, by some clients, each with a SKU of its own:
/// nobody waits for a lock of another of them, so who waits, waits for something else.
struct Trade {
    stop: CancellationToken,
    clients: JoinSet<Vec<(bool, Duration)>>,
}

/// What has been done so far, and whether it is done beside a migration.
static CALLS: AtomicI64 = AtomicI64::new(0);
static BESIDE: AtomicBool = AtomicBool::new(false);

impl Trade {
    fn start(pool: &PgPool, first: usize) -> Trade {
        let (stop, mut clients) = (CancellationToken::new(), JoinSet::new());
        for client in 1..=CLIENTS {
            let options = (*pool.connect_options()).clone();
            // a lock that a migration keeps for longer is an error, whatever else makes this machine slow
            let options = options.options([("lock_timeout", "150")]);
            let (stop, mut id) = (stop.clone(), first as i64 + client);
            clients.spawn(async move {
                let mut db = options.connect().await.expect("a connection");
                let mut took = Vec::new();
                while !stop.is_cancelled() {
                    for statements in [place(id, client), pay(id, client)] {
                        let (beside, started) = (BESIDE.load(Ordering::SeqCst), Instant::now());
                        let done = sqlx::raw_sql(AssertSqlSafe(statements))
                            .execute(&mut db)
                            .await;
                        done.expect("no call fails");
                        took.push((beside, started.elapsed()));
                        CALLS.fetch_add(1, Ordering::SeqCst);
                    }
                    id += CLIENTS;
                }
                took
            });
        }
        Trade { stop, clients }
    }

    async fn calls(&self, more: i64) {
        let enough = CALLS.load(Ordering::SeqCst) + more;
        eventually("calls", async || CALLS.load(Ordering::SeqCst) >= enough).await;
    }

    /// The times that calls took, in order: without a migration, and beside it.
    async fn finish(self) -> (Vec<Duration>, Vec<Duration>) {
        self.stop.cancel();
        let took = self.clients.join_all().await.concat();
        let of = |beside| {
            let mut of: Vec<_> = took
                .iter()
                .filter(|(b, _)| *b == beside)
                .map(|(_, t)| *t)
                .collect();
            of.sort();
            of
        };
        (of(false), of(true))
    }
}

fn place(id: i64, sku: i64) -> String {
    format!(
        "BEGIN;
         INSERT INTO loms.idempotency_key (user_id, key, body_hash, order_id) VALUES (1, 'k{id}', '', {id}) ON CONFLICT DO NOTHING;
         SELECT count FROM loms.stock WHERE sku = {sku} FOR NO KEY UPDATE;
         INSERT INTO loms.user_order (id, user_id, status) VALUES ({id}, 1, 'awaiting payment');
         INSERT INTO loms.order_item VALUES ({id}, {sku}, 1);
         INSERT INTO loms.unpaid_order VALUES ({id}, now() + interval '10 min');
         INSERT INTO loms.reservation_stock VALUES ({id}, 1, {sku}, 1);
         UPDATE loms.stock SET count = count - 1 WHERE sku = {sku} AND warehouse_id = 1;
         INSERT INTO loms.status_change (order_id, sequence, from_status, to_status, actor)
         VALUES ({id}, 1, NULL, 'new', 'user'), ({id}, 2, 'new', 'awaiting payment', 'user');
         INSERT INTO loms.outbox (order_id, sequence) VALUES ({id}, 1), ({id}, 2);
         COMMIT"
    )
}

fn pay(id: i64, sku: i64) -> String {
    format!(
        "BEGIN;
         SELECT status FROM loms.user_order WHERE id = {id} FOR NO KEY UPDATE;
         UPDATE loms.user_order SET status = 'payed' WHERE id = {id} AND status = 'awaiting payment';
         DELETE FROM loms.unpaid_order WHERE order_id = {id};
         DELETE FROM loms.reservation_stock WHERE order_id = {id};
         INSERT INTO loms.write_off (order_id, warehouse_id, sku, count) VALUES ({id}, 1, {sku}, 1);
         INSERT INTO loms.status_change (order_id, sequence, from_status, to_status, actor)
         VALUES ({id}, 3, 'awaiting payment', 'payed', 'user');
         INSERT INTO loms.outbox (order_id, sequence) VALUES ({id}, 3);
         COMMIT"
    )
}

const INVALID: &str = "SELECT count(*) FROM pg_index WHERE NOT indisvalid";
const MIGRATING: &str = "SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'migrate'";

#[tokio::test]
async fn orders_and_payments_do_not_wait_for_it() {
    let pool = testkit::empty_database("loms").await;
    let orders = 50_000 * scale();
    loms::MIGRATOR.run_to(4, &pool).await.unwrap();
    fill(&pool, orders).await;
    let config = process::config(&pool, "orders", &json!({}));
    let trade = Trade::start(&pool, orders);
    trade.calls(500).await;

    // somebody who has claimed a key, and somebody who has read a history, and who take their time
    let mut claimed = pool.begin().await.unwrap();
    let key = "INSERT INTO loms.idempotency_key VALUES (1, 'long', '', 1)";
    sqlx::query(key).execute(&mut *claimed).await.unwrap();
    let mut read = pool.begin().await.unwrap();
    let history = "SELECT FROM loms.status_change LIMIT 1";
    sqlx::query(history).execute(&mut *read).await.unwrap();

    BESIDE.store(true, Ordering::SeqCst);
    let mut one = start_migrate(&config);
    eventually("an index that is being built", async || {
        let waits = "SELECT count(*) FROM pg_stat_progress_create_index
                     WHERE datname = current_database() AND phase LIKE 'waiting%'";
        count(&pool, waits).await == 1
    })
    .await;
    let other = start_migrate(&config);
    eventually("another", async || count(&pool, MIGRATING).await == 2).await;
    one.kill().await.unwrap();
    // its backend ends too, and leaves what it built
    eventually("one", async || count(&pool, MIGRATING).await == 1).await;
    assert_eq!(count(&pool, INVALID).await, 1);
    trade.calls(200).await;
    claimed.rollback().await.unwrap();
    let version = |version| move |(last,): (i64,)| last == version;
    eventually("0005", async || {
        let last = "SELECT max(version) FROM loms._sqlx_migrations";
        version(5)(rows(&pool, last).await.remove(0))
    })
    .await;
    // 0006 wants the table of histories for itself
    trade.calls(200).await;
    read.rollback().await.unwrap();
    let done = ended(other).await;
    assert!(done.success(), "{done:?}");
    BESIDE.store(false, Ordering::SeqCst);
    trade.calls(500).await;

    let (without, beside) = trade.finish().await;
    let at = |of: &[Duration], part: usize| of[(of.len() - 1) * part / 1000];
    for (name, of) in [("without", &without), ("beside a migration", &beside)] {
        println!(
            "{name}: {} calls, p50 {:?}, p99 {:?}, p99.9 {:?}, longest {:?}",
            of.len(),
            at(of, 500),
            at(of, 990),
            at(of, 999),
            at(of, 1000)
        );
    }
    // what makes calls slow without a migration too is not its doing
    let allowed = Duration::from_millis(200).max(2 * at(&without, 1000));
    assert!(at(&beside, 1000) <= allowed, "{:?}", at(&beside, 1000));

    assert_eq!(count(&pool, INVALID).await, 0);
    let found = schema(&pool).await;
    let audit = process::run(&config, &["audit"]).await;
    assert!(audit.status.success(), "{audit:?}");
    oracle::run(&pool, "DROP SCHEMA loms CASCADE").await;
    loms::MIGRATOR.run(&pool).await.unwrap();
    assert_eq!(found, schema(&pool).await);
}
