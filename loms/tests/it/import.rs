//! `loms import`: what an hour of load on the system before has left becomes orders and stock that
//! add up, whatever happens to the import; and a payment for its order 1 pays that order.

use std::process::Output;

use serde_json::{Value, json};
use sqlx::{ConnectOptions as _, Connection as _, PgPool};
use tonic::Code;

use crate::{
    import_oracle::{assert_same, assert_taken_over, written},
    import_source::{leave, load, tables},
    kafka,
    oracle::{self, count, rows},
    process::{self, File, run},
    test_app::{TestApp, eventually, seed},
};

const ORDERS: i64 = 600;

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

fn config(pool: &PgPool) -> File {
    process::config(pool, "orders", &json!({}))
}

/// `loms import` as an operator runs it, when the test has left the database.
pub(crate) async fn import(pool: &PgPool, arguments: &[&str]) -> (Option<i32>, String, String) {
    leave(pool).await;
    let arguments = [&["import"], arguments].concat();
    said(&run(&config(pool), &arguments).await)
}

async fn assert_audited(pool: &PgPool) {
    let audit = said(&run(&config(pool), &["audit"]).await);
    assert_eq!(audit.0, Some(0), "{audit:?}");
}

async fn migrate(pool: &PgPool) {
    let (code, _, error) = said(&run(&config(pool), &["migrate"]).await);
    assert_eq!(code, Some(0), "{error}");
}

/// Refused with 64, on one line that has `needle`.
#[track_caller]
fn refused((code, printed, error): &(Option<i32>, String, String), needle: &str) {
    assert_eq!(*code, Some(64), "{printed} {error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains(needle), "{needle} is not in {error}");
}

#[tokio::test]
async fn a_payment_for_its_order_pays_that_order() {
    let pool = testkit::empty_database("loms").await;
    load(&pool, seed(), ORDERS).await;
    // nothing is made beside it
    for command in ["migrate", "serve"] {
        let output = said(&run(&config(&pool), &[command]).await);
        refused(&output, "`loms import`");
        refused(&output, "public.user_order");
    }
    let (code, planned, _) = import(&pool, &["--dry-run"]).await;
    assert_eq!(code, Some(0), "{planned}");
    assert!(planned.contains("nothing is changed"), "{planned}");
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'loms'";
    assert_eq!(count(&pool, schemas).await, 0);
    let (code, printed, error) = import(&pool, &[]).await;
    assert_eq!((code, error.as_str()), (Some(0), ""), "{printed}");
    // the plan was kept, line by line
    let report = planned.rsplit_once("\nnothing is changed").unwrap().0;
    assert!(printed.starts_with(report), "{printed}\nnot\n{report}");
    assert_taken_over(&pool).await;
    assert_audited(&pool).await;
    let before = written(&pool).await;
    let (code, printed, _) = import(&pool, &[]).await;
    assert_eq!(
        (code, printed.as_str()),
        (Some(0), "it had been imported before: nothing changed")
    );
    assert_same(&written(&pool).await, &before);
    let told: Vec<(i64,)> = rows(&pool, "SELECT order_id FROM loms.outbox ORDER BY id").await;

    let app = TestApp::start(&pool, json!({})).await;
    let first = app.list(1).await;
    assert_eq!(first.status, "awaiting payment");
    assert_eq!((first.created_at, first.history[1].at), (None, None));
    assert_eq!(first.history[1].actor, "import");
    app.pay(1).await.unwrap();
    // done is done, also beside the service
    let (code, printed, error) = said(&run(&config(&pool), &["import"]).await);
    assert_eq!(code, Some(0), "{error}");
    assert!(printed.contains("nothing changed"), "{printed}");
    let payed = app.list(1).await;
    assert_eq!((payed.status.as_str(), payed.user), ("payed", first.user));
    assert_eq!(payed.items, first.items);
    let sku = 39;
    assert!(app.stocks(sku).await.iter().all(|(place, _)| *place < 10));
    let new = app.create(3, &[(sku, 1)]).await;
    assert!(new.order_id > ORDERS + 100, "{new:?}");
    // what was sold before is in no delivery of ours
    let refused = app.receive("d", &[(i64::MAX, 7, 1)]).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_told(&pool, &app, &told, new.order_id).await;
    let (config, stopped) = (app.config.clone(), app.stop().await);
    stopped.unwrap();
    let report = loms::audit(&config).await.unwrap();
    assert!(report.differences.is_empty(), "{report}");
}

/// What the import decided is in the log, once each, with the user and without a time; the rest is
/// what happened since.
async fn assert_told(pool: &PgPool, app: &TestApp, told: &[(i64,)], new: i64) {
    eventually("an empty outbox", async || {
        count(pool, "SELECT count(*) FROM loms.outbox").await == 0
    })
    .await;
    let log = kafka::read_log(&app.topic).await;
    let of = |wanted: &dyn Fn(&Value) -> bool| -> Vec<i64> {
        let events = log.iter().map(|event| &event.value);
        let mut ids: Vec<_> = events
            .filter(|value| wanted(value))
            .map(|value| value["OrderID"].as_i64().unwrap())
            .collect();
        ids.sort_unstable();
        ids
    };
    let decided = of(&|value| {
        value["Sequence"] == 2
            && value["Status"] == "failed"
            && value.get("OccurredAt").is_none()
            && value["UserId"].as_i64() > Some(0)
    });
    let mut told: Vec<i64> = told.iter().map(|(id,)| *id).collect();
    told.sort_unstable();
    assert_eq!(decided, told);
    let since = of(&|value| value.get("OccurredAt").is_some());
    assert_eq!(since, [1, new, new]);
}

#[tokio::test]
async fn from_another_database() {
    let (source, pool) = (
        testkit::empty_database("loms").await,
        testkit::empty_database("loms").await,
    );
    let seed = seed();
    load(&source, seed, ORDERS).await;
    let url = testkit::url(&source);
    // a service that has begun has drawn numbers
    migrate(&pool).await;
    let app = TestApp::start(&pool, json!({})).await;
    refused(&import(&pool, &["--from", &url]).await, "loms is at work");
    app.stop().await.unwrap();
    let (code, _, error) = import(&pool, &["--from", &url]).await;
    assert_eq!((code, error.as_str()), (Some(0), ""));
    assert_audited(&pool).await;
    // the same as from its own
    let own = import(&source, &[]).await;
    assert_eq!(own.0, Some(0), "{own:?}");
    assert_same(&written(&pool).await, &written(&source).await);
    // its own database has nothing to import
    migrate(&pool).await;
    let nothing = import(&testkit::empty_database("loms").await, &[]).await;
    refused(&nothing, "public.user_order is not there");
}

#[tokio::test]
async fn nobody_else_may_be_connected() {
    let pool = testkit::empty_database("loms").await;
    load(&pool, seed(), 20).await;
    let options = (*pool.connect_options()).clone();
    let other = options.application_name("the old loms").connect().await;
    let mut other = other.unwrap();
    refused(&import(&pool, &[]).await, "the old loms");
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'loms'";
    assert_eq!(count(&pool, schemas).await, 0);
    // to plan is allowed
    let (code, printed, _) = import(&pool, &["--dry-run"]).await;
    assert_eq!(code, Some(0));
    assert!(printed.contains("1 other sessions"), "{printed}");
    sqlx::query("SELECT 1").execute(&mut other).await.unwrap();
    other.close().await.unwrap();
    // of another user, of whom ours sees little
    let admin = testkit::admin(&pool).await;
    let session = admin.acquire().await.unwrap();
    refused(&import(&pool, &[]).await, "1 other sessions");
    drop(session);
    admin.close().await;
    assert_eq!(import(&pool, &[]).await.0, Some(0));
}

#[tokio::test]
async fn a_source_that_is_away_is_no_fault_and_one_that_is_none_is() {
    let pool = testkit::empty_database("loms").await;
    let away = ["--from", "postgres://127.0.0.1:1/shop", "--wait", "300ms"];
    let (code, _, error) = import(&pool, &away).await;
    assert_eq!(code, Some(69), "{error}");
    assert!(error.contains("127.0.0.1:1"), "{error}");
    let none = import(&pool, &["--from", "shop:secret@nowhere"]).await;
    refused(&none, "loms: --from: ");
    assert!(!none.2.contains("secret"), "{none:?}");
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'loms'";
    assert_eq!(count(&pool, schemas).await, 0);
}

#[tokio::test]
async fn what_is_declined_stays_where_it_is() {
    let pool = testkit::empty_database("loms").await;
    load(&pool, seed(), 20).await;
    for _ in 0..2 {
        let (code, printed, _) = import(&pool, &["--decline"]).await;
        assert_eq!(code, Some(0));
        assert!(printed.contains("declined"), "{printed}");
    }
    migrate(&pool).await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d", &[(1, 7, 5)]).await.unwrap();
    assert_eq!(app.create(1, &[(7, 1)]).await.order_id, 1);
    app.finish().await;
    // it would mix with what is there now
    refused(&import(&pool, &[]).await, "in use");
    let orders = "SELECT count(*) FROM public.user_order";
    assert_eq!(count(&pool, orders).await, 20);
}

#[tokio::test]
async fn tables_of_others_and_empty_ones_are_in_nobodys_way() {
    let pool = testkit::empty_database("loms").await;
    oracle::run(
        &pool,
        "CREATE TABLE public.stock (warehouse_id INT, sku INT, count INT, price INT)",
    )
    .await;
    oracle::run(&pool, "INSERT INTO public.stock VALUES (1, 1, 1, 1)").await;
    migrate(&pool).await;
    refused(&import(&pool, &[]).await, "public.");
    oracle::run(&pool, "DROP TABLE public.stock").await;
    tables(&pool).await;
    let app = TestApp::start(&pool, json!({})).await;
    // it begins while nobody looks
    oracle::run(&pool, "INSERT INTO public.stock VALUES (1, 1, 1)").await;
    eventually("an unready service", async || {
        let answer = app.get("/readyz").await;
        answer.status == 503 && answer.text.contains("run import")
    })
    .await;
    app.stop().await.unwrap();
}

#[tokio::test]
async fn rows_that_cannot_be_are_named_before_anything_is_written() {
    let pool = testkit::empty_database("loms").await;
    tables(&pool).await;
    oracle::run(
        &pool,
        "INSERT INTO public.user_order VALUES (1, 0, 'payed'), (2, 7, 'new');
         INSERT INTO public.order_item VALUES (1, 7, 1), (2, 0, 1), (2, 7, 70000);
         INSERT INTO public.stock VALUES (0, 7, 1)",
    )
    .await;
    let dry = import(&pool, &["--dry-run"]).await;
    refused(&dry, "order 1 is of user 0");
    refused(&dry, "SKU 7 in warehouse 0");
    let real = import(&pool, &[]).await;
    refused(&real, "order 1 is of user 0; ");
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'loms'";
    assert_eq!(count(&pool, schemas).await, 0);
    oracle::run(
        &pool,
        "UPDATE public.user_order SET user_id = 3 WHERE user_id = 0",
    )
    .await;
    oracle::run(&pool, "UPDATE public.stock SET warehouse_id = 1").await;
    let (code, printed, error) = import(&pool, &[]).await;
    assert_eq!(code, Some(0), "{error}");
    assert!(printed.contains("1 lines of SKU 0"), "{printed}");
    assert_audited(&pool).await;
    let line = "SELECT count FROM loms.order_item WHERE order_id = 2";
    assert_eq!(count(&pool, line).await, 70_000);
}

#[tokio::test]
async fn an_order_keeps_its_own_times() {
    let pool = testkit::empty_database("loms").await;
    tables(&pool).await;
    oracle::run(
        &pool,
        "ALTER TABLE public.user_order ADD created_at TIMESTAMP, ADD updated_at TIMESTAMPTZ;
         INSERT INTO public.user_order
         VALUES (1, 7, 'payed', '2023-06-01 12:00', '2023-06-01 10:00Z'), (2, 7, 'failed', NULL, NULL);
         INSERT INTO public.order_item VALUES (1, 7, 1), (2, 7, 1)",
    )
    .await;
    let (code, _, error) = import(&pool, &["--time-zone", "Europe/Moscow"]).await;
    assert_eq!(code, Some(0), "{error}");
    let times: Vec<(i64, Option<String>)> = rows(
        &pool,
        "SELECT order_id, to_char(at AT TIME ZONE 'UTC', 'HH24:MI') FROM loms.status_change ORDER BY order_id, sequence",
    )
    .await;
    let times: Vec<_> = times.iter().map(|(id, at)| (*id, at.as_deref())).collect();
    let own = [Some("09:00"), Some("09:00"), Some("10:00")].map(|at| (1, at));
    assert_eq!(times, [&own[..], &[(2, None); 2]].concat());
    let sold = "SELECT count(*) FROM loms.write_off WHERE at = '2023-06-01 10:00Z'";
    assert_eq!(count(&pool, sold).await, 1);
}
