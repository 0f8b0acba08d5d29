//! `checkout import`: the carts of the system before become ours, whatever happens to the import.

use std::process::Output;

use serde_json::json;
use sqlx::{ConnectOptions as _, Connection as _, PgPool};
use testkit::process::{File, run};

use crate::test_app::{TestApp, config as changed, eventually};

const CHECKOUT: &str = env!("CARGO_BIN_EXE_checkout");

/// Carts of 300 users, some empty, and what no cart of ours can hold.
const LOAD: &str = "
    CREATE TABLE public.cart (id SERIAL PRIMARY KEY, user_id BIGINT NOT NULL UNIQUE);
    CREATE TABLE public.cart_item (cart_id BIGINT NOT NULL, sku BIGINT NOT NULL, count INT NOT NULL, PRIMARY KEY (cart_id, sku));
    INSERT INTO public.cart (user_id) SELECT 1000 - i FROM generate_series(1, 300) AS i;
    INSERT INTO public.cart_item
    SELECT i, 1 + (i * l) % 4000000000, 1 + i % 7 FROM generate_series(1, 300) AS i, generate_series(1, 3) AS l WHERE i % 5 <> 0;
    INSERT INTO public.cart VALUES (301, 0);
    INSERT INTO public.cart_item VALUES (301, 7, 1), (999, 7, 1), (5, 0, 1), (5, 8, 0), (5, 9, 70000);
    SELECT setval('public.cart_id_seq', 400)";

async fn load(pool: &PgPool) {
    sqlx::raw_sql(LOAD).execute(pool).await.unwrap();
}

fn config(pool: &PgPool) -> File {
    let nowhere = "127.0.0.1:1".parse().unwrap();
    File::new(&changed(pool, [nowhere; 2], &json!({})).to_string())
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// `checkout import` as an operator runs it, when the test has left the database.
async fn import(pool: &PgPool, arguments: &[&str]) -> (Option<i32>, String, String) {
    leave(pool).await;
    let arguments = [&["import"], arguments].concat();
    said(&run(CHECKOUT, &config(pool), &arguments).await)
}

/// Waits until the test's own connections have ended.
async fn leave(pool: &PgPool) {
    eventually("no connection of the test", async || pool.size() == 0).await;
}

/// Refused with 64, on one line that has `needle`.
#[track_caller]
fn refused((code, printed, error): &(Option<i32>, String, String), needle: &str) {
    assert_eq!(*code, Some(64), "{printed} {error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains(needle), "{needle} is not in {error}");
}

async fn count(pool: &PgPool, statement: &'static str) -> i64 {
    sqlx::query_scalar(statement).fetch_one(pool).await.unwrap()
}

/// All that an import has written.
async fn written(pool: &PgPool) -> Vec<String> {
    let written = "SELECT 'cart ' || c::text FROM checkout.cart c
        UNION ALL SELECT 'item ' || i::text FROM checkout.cart_item i
        UNION ALL SELECT 'number ' || last_value FROM checkout.cart_id_seq
        UNION ALL SELECT 'import ' || state || ' ' || through FROM checkout.import ORDER BY 1";
    let written: Vec<String> = sqlx::query_scalar(written).fetch_all(pool).await.unwrap();
    assert!(written.len() > 1000, "{written:?}");
    written
}

#[tokio::test]
async fn carts_are_taken_over_once() {
    let pool = testkit::empty_database("checkout").await;
    load(&pool).await;
    for command in ["migrate", "serve"] {
        let output = said(&run(CHECKOUT, &config(&pool), &[command]).await);
        refused(&output, "`checkout import`");
        refused(&output, "public.cart, public.cart_item");
    }
    let (code, planned, _) = import(&pool, &["--dry-run"]).await;
    assert_eq!(code, Some(0), "{planned}");
    for line in [
        "carts: 300 with 721 lines",
        "1 carts of users below 1",
        "2 lines of SKU 0 or without units",
        "1 lines of more than 65535 units",
        "1 lines of carts that are not there",
    ] {
        assert!(planned.contains(line), "{line} is not in {planned}");
    }
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'checkout'";
    assert_eq!(count(&pool, schemas).await, 0);
    let (code, printed, error) = import(&pool, &[]).await;
    assert_eq!((code, error.as_str()), (Some(0), ""), "{printed}");
    let report = planned.rsplit_once("\nnothing is changed").unwrap().0;
    assert!(printed.starts_with(report), "{printed}\nnot\n{report}");
    let differences = "SELECT count(*) FROM (SELECT user_id, sku, least(count, 65535) FROM public.cart JOIN public.cart_item ON id = cart_id
            WHERE user_id > 0 AND sku > 0 AND count > 0) AS p (user_id, sku, count)
        FULL JOIN (SELECT user_id, sku, count FROM checkout.cart JOIN checkout.cart_item ON id = cart_id) AS c USING (user_id, sku)
        WHERE p.count IS DISTINCT FROM c.count";
    assert_eq!(count(&pool, differences).await, 0);
    let before = written(&pool).await;
    assert!(before.contains(&"number 400".to_owned()));
    let (code, printed, _) = import(&pool, &[]).await;
    assert_eq!(code, Some(0));
    assert!(printed.contains("nothing changed"), "{printed}");
    assert_eq!(written(&pool).await, before);

    let app = TestApp::start(pool.clone()).await;
    app.loms.stock(7, 10);
    assert_eq!(app.cart(999).await, [(2, 2), (3, 2), (4, 2)]);
    app.add(5000, 7, 1).await.unwrap();
    app.add(999, 7, 1).await.unwrap();
    assert_eq!(app.cart(999).await, [(2, 2), (3, 2), (4, 2), (7, 1)]);
    let newest = "SELECT id FROM checkout.cart WHERE user_id = 5000";
    assert!(count(&pool, newest).await > 400);
    app.finish().await;
}

#[tokio::test]
async fn carts_of_another_database_and_others_who_are_connected() {
    let source = testkit::empty_database("checkout").await;
    let pool = testkit::empty_database("checkout").await;
    load(&source).await;
    leave(&source).await;
    let options = (*source.connect_options()).clone();
    let options = options.application_name("the old checkout");
    let other = options.connect().await.unwrap();
    let url = testkit::url(&source);
    refused(&import(&pool, &["--from", &url]).await, "the old checkout");
    other.close().await.unwrap();
    let (code, _, error) = import(&pool, &["--from", &url]).await;
    assert_eq!((code, error.as_str()), (Some(0), ""));
    assert_eq!(import(&source, &[]).await.0, Some(0));
    assert_eq!(written(&pool).await, written(&source).await);
}

#[tokio::test]
async fn carts_may_be_declined() {
    let pool = testkit::empty_database("checkout").await;
    load(&pool).await;
    assert_eq!(import(&pool, &["--decline"]).await.0, Some(0));
    let migrated = said(&run(CHECKOUT, &config(&pool), &["migrate"]).await);
    assert_eq!(migrated.0, Some(0), "{migrated:?}");
    assert_eq!(count(&pool, "SELECT count(*) FROM checkout.cart").await, 0);
    // and it may still be thought over
    assert_eq!(import(&pool, &[]).await.0, Some(0));
    refused(&import(&pool, &["--decline"]).await, "an import has begun");
}

#[cfg(feature = "failpoints")]
#[tokio::test]
async fn aborted_after_every_slice_carts_are_the_same() {
    use std::{os::unix::process::ExitStatusExt as _, process::Stdio};

    const SIGABRT: i32 = 6;
    let whole = testkit::empty_database("checkout").await;
    let cut = testkit::empty_database("checkout").await;
    load(&whole).await;
    load(&cut).await;
    let cut_at = async |point: &str| {
        leave(&cut).await;
        let config = config(&cut);
        let mut command = tokio::process::Command::new(testkit::process::program(CHECKOUT));
        command.args(["import", "--slice", "100", "--config", config.path()]);
        command.env("FAILPOINTS", format!("{point}=return"));
        command.stdin(Stdio::null()).output().await.unwrap().status
    };
    let mut cuts = 0;
    loop {
        let ended = cut_at("slice-importing").await;
        assert_eq!(
            ended.signal().or(ended.code()),
            Some(if cuts < 6 { SIGABRT } else { 0 })
        );
        if cut_at("slice-imported").await.success() {
            break;
        }
        cuts += 1;
        let running = "SELECT count(*) FROM checkout.import WHERE state = 'running'";
        if count(&cut, running).await == 1 {
            let refusal = said(&run(CHECKOUT, &config(&cut), &["serve"]).await);
            refused(&refusal, "run `checkout import` again");
        }
    }
    // the first, four of carts, the last
    assert_eq!(cuts, 6);
    assert_eq!(import(&whole, &[]).await.0, Some(0));
    assert_eq!(written(&cut).await, written(&whole).await);
}
