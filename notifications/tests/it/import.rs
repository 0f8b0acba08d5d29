//! `notifications import`: what the system before has told is in the history, and is not told
//! again, whatever happens to the import and whatever the topic still has.

use std::process::Output;

use serde_json::json;
use sqlx::{ConnectOptions as _, Connection as _, PgPool};
use testkit::process::{File, run};

use crate::{
    kafka::{Kafka, event},
    telegram::Telegram,
    test_app::{TestApp, eventually, settings},
};

const NOTIFICATIONS: &str = env!("CARGO_BIN_EXE_notifications");

/// 300 orders of 50 users. What a consumer without committed offsets read twice is there twice.
const LOAD: &str = "
    CREATE TYPE public.order_status AS ENUM ('new', 'payed', 'failed', 'awaiting payment', 'cancelled');
    CREATE TABLE public.message (id SERIAL PRIMARY KEY, user_id BIGINT NOT NULL, order_id BIGINT NOT NULL,
                                 status public.order_status NOT NULL, message CHAR(255) NOT NULL, created_date TIMESTAMP DEFAULT NOW());
    INSERT INTO public.message (user_id, order_id, status, message, created_date)
    SELECT 1 + i % 50, i, status::public.order_status, 'order is created', timestamp '2023-06-01 12:00' + make_interval(mins => i, secs => nth)
    FROM generate_series(1, 300) AS i, unnest(ARRAY['new', 'awaiting payment', 'payed']) WITH ORDINALITY AS s (status, nth);
    INSERT INTO public.message (user_id, order_id, status, message, created_date)
    SELECT user_id, order_id, status, message, created_date + interval '1 day' FROM public.message WHERE order_id <= 60 ORDER BY id;
    INSERT INTO public.message (user_id, order_id, status, message, created_date)
    SELECT user_id, order_id, status::public.order_status, 'order is created', timestamp '2023-06-05 12:00'
    FROM (VALUES (0, 1, 'new'), (9, 500, 'new'), (9, 500, 'awaiting payment')) AS few (user_id, order_id, status);
    SELECT setval('public.message_id_seq', 2000)";
/// Those that are taken over.
const MESSAGES: i64 = 900 + 180 + 2;

async fn load(pool: &PgPool) {
    sqlx::raw_sql(LOAD).execute(pool).await.expect("a load");
}

fn config(pool: &PgPool, kafka: &Kafka) -> File {
    // a dollar in it begins a variable
    let settings = settings(pool, kafka, json!({})).to_string();
    File::new(&settings.replace('$', "$$"))
}

type Said = (Option<i32>, String, String);

fn said(output: &Output) -> Said {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// `notifications import` as an operator runs it, when the test has left the database.
async fn import(pool: &PgPool, kafka: &Kafka, arguments: &[&str]) -> Said {
    leave(pool).await;
    let arguments = [&["import"], arguments].concat();
    said(&run(NOTIFICATIONS, &config(pool, kafka), &arguments).await)
}

/// Waits until the test's own connections have ended.
async fn leave(pool: &PgPool) {
    eventually("no connection of the test", async || pool.size() == 0).await;
}

/// Refused with 64, on one line that has `needle`.
#[track_caller]
fn refused((code, printed, error): &Said, needle: &str) {
    assert_eq!(*code, Some(64), "{printed} {error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains(needle), "{needle} is not in {error}");
}

async fn count(pool: &PgPool, statement: &'static str) -> i64 {
    let count = sqlx::query_scalar(statement).fetch_one(pool).await;
    count.expect("a count")
}

/// All that an import has written, but for what the clock says.
async fn written(pool: &PgPool) -> Vec<String> {
    let written = "SELECT concat_ws('|', 'message', id, user_id, order_id, sequence, status, message, created_at, told_at, given_up_at,
                         attempts, source_partition, source_offset, superseded) FROM notifications.message
        UNION ALL SELECT 'number ' || last_value FROM notifications.message_id_seq
        UNION ALL SELECT 'import ' || state || ' ' || through FROM notifications.import ORDER BY 1";
    let written: Vec<String> = sqlx::query_scalar(written)
        .fetch_all(pool)
        .await
        .expect("rows");
    assert!(written.len() as i64 == MESSAGES + 2, "{written:?}");
    written
}

#[tokio::test]
async fn what_was_told_is_in_the_history_and_not_told_again() {
    let pool = testkit::empty_database("notifications").await;
    let (kafka, telegram) = (Kafka::new().await, Telegram::start().await);
    load(&pool).await;
    for command in ["migrate", "serve"] {
        let output = said(&run(NOTIFICATIONS, &config(&pool, &kafka), &[command]).await);
        refused(&output, "`notifications import`");
        refused(&output, "public.message");
    }
    let (code, planned, _) = import(&pool, &kafka, &["--dry-run"]).await;
    assert_eq!(code, Some(0), "{planned}");
    assert!(
        planned.contains("messages: 1082, told already"),
        "{planned}"
    );
    assert!(
        planned.contains("1 of users or orders below 1"),
        "{planned}"
    );
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'notifications'";
    assert_eq!(count(&pool, schemas).await, 0);
    let (code, printed, error) = import(&pool, &kafka, &[]).await;
    assert_eq!((code, error.as_str()), (Some(0), ""), "{printed}");
    let report = planned.rsplit_once("\nnothing is changed").expect("it").0;
    assert!(printed.starts_with(report), "{printed}\nnot\n{report}");
    let differences = "SELECT count(*) FROM (SELECT * FROM public.message WHERE user_id > 0) AS p FULL JOIN notifications.message m ON m.id = p.id
        WHERE (m.user_id, m.order_id, m.status, m.message, m.created_at, m.told_at)
              IS DISTINCT FROM (p.user_id, p.order_id, p.status::text, rtrim(p.message), p.created_date AT TIME ZONE 'UTC',
                                p.created_date AT TIME ZONE 'UTC')
           OR m.superseded IS DISTINCT FROM (p.created_date BETWEEN '2023-06-02 12:00' AND '2023-06-03')";
    assert_eq!(count(&pool, differences).await, 0);
    let before = written(&pool).await;
    let (code, printed, _) = import(&pool, &kafka, &[]).await;
    assert_eq!(code, Some(0));
    assert!(printed.contains("nothing changed"), "{printed}");
    assert_eq!(written(&pool).await, before);

    // the topic still has what was told, and something new
    let changes = json!({
        "telegram": {"api_key": "123456:the-key", "chat_id": "1", "api_url": telegram.url},
    });
    let old = |status: &str| {
        format!(r#"{{"UserId":8,"OrderID":7,"Status":"{status}","Message":"order is created"}}"#)
    };
    for status in ["new", "awaiting payment", "payed"] {
        kafka.send(7, &old(status)).await;
    }
    let at = "2026-03-01T10:00:00Z";
    kafka.send(7, &event(8, 7, 3, "payed", at)).await;
    kafka.send(1007, &event(8, 1007, 1, "new", at)).await;
    // what an import of LOMS decides has no time
    let decided = r#"{"UserId":9,"OrderID":500,"Status":"failed","Message":"no","Sequence":2}"#;
    kafka.send(500, decided).await;
    let app = TestApp::start(&pool, &kafka, changes).await;
    eventually("what is new is told", async || telegram.count() == 2).await;
    let told = telegram.texts().join(" ");
    for told_once in [
        "Order 1007 of user 8 is new",
        "Order 500 of user 9 is failed",
    ] {
        assert!(told.contains(told_once), "{told}");
    }
    eventually("it is marked", async || {
        app.count("told_at IS NULL AND given_up_at IS NULL").await == 0
    })
    .await;
    assert_eq!(app.count("order_id = 7 AND id <= 2000").await, 6);
    assert_eq!(app.count("id > 2000").await, 2);
    let of_order_7: Vec<_> = app.statuses(8).await;
    let of_order_7: Vec<_> = of_order_7.iter().filter(|(order, _)| *order == 7).collect();
    assert_eq!(of_order_7[0].1, "new");
    assert!(kafka.dead_letters(0).is_empty());
    app.finish().await;
    assert_eq!(telegram.count(), 2);
}

#[tokio::test]
async fn messages_of_another_database_and_others_who_are_connected() {
    let source = testkit::empty_database("notifications").await;
    let pool = testkit::empty_database("notifications").await;
    let kafka = Kafka::new().await;
    load(&source).await;
    leave(&source).await;
    let options = (*source.connect_options()).clone();
    let options = options.application_name("the old notifications");
    let other = options.connect().await.expect("a session");
    let url = testkit::url(&source);
    let from = ["--from", &url];
    refused(&import(&pool, &kafka, &from).await, "the old notifications");
    other.close().await.expect("an end");
    let (code, _, error) = import(&pool, &kafka, &from).await;
    assert_eq!((code, error.as_str()), (Some(0), ""));
    assert_eq!(import(&source, &kafka, &[]).await.0, Some(0));
    assert_eq!(written(&pool).await, written(&source).await);
}

#[tokio::test]
async fn messages_have_a_time_of_some_zone_or_are_refused() {
    let pool = testkit::empty_database("notifications").await;
    let kafka = Kafka::new().await;
    load(&pool).await;
    let none = "UPDATE public.message SET created_date = NULL WHERE id = 3";
    sqlx::query(none).execute(&pool).await.expect("a change");
    refused(&import(&pool, &kafka, &[]).await, "message 3 has no time");
    let some = "UPDATE public.message SET created_date = '2023-06-01 12:01:03' WHERE id = 3";
    sqlx::query(some).execute(&pool).await.expect("a change");
    let zone = ["--time-zone", "Europe/Moscow"];
    assert_eq!(import(&pool, &kafka, &zone).await.0, Some(0));
    let first = "SELECT count(*) FROM notifications.message WHERE id = 1 AND created_at = '2023-06-01 09:01:01Z'";
    assert_eq!(count(&pool, first).await, 1);
    refused(
        &import(&pool, &kafka, &["--decline"]).await,
        "an import has begun",
    );
}

#[cfg(feature = "failpoints")]
#[tokio::test]
async fn aborted_after_every_slice_messages_are_the_same() {
    use std::{os::unix::process::ExitStatusExt as _, process::Stdio};

    const SIGABRT: i32 = 6;
    let whole = testkit::empty_database("notifications").await;
    let cut = testkit::empty_database("notifications").await;
    let kafka = Kafka::new().await;
    load(&whole).await;
    load(&cut).await;
    let cut_at = async |point: &str| {
        leave(&cut).await;
        let config = config(&cut, &kafka);
        let mut command = tokio::process::Command::new(testkit::process::program(NOTIFICATIONS));
        command.args(["import", "--slice", "300", "--config", config.path()]);
        command.env("FAILPOINTS", format!("{point}=return"));
        let ended = command.stdin(Stdio::null()).output().await;
        ended.expect("an end").status
    };
    let mut cuts = 0;
    loop {
        let ended = cut_at("slice-importing").await;
        let expected = if cuts < 6 { SIGABRT } else { 0 };
        assert_eq!(ended.signal().or(ended.code()), Some(expected));
        if cut_at("slice-imported").await.success() {
            break;
        }
        cuts += 1;
        let running = "SELECT count(*) FROM notifications.import WHERE state = 'running'";
        if count(&cut, running).await == 1 {
            let refusal = said(&run(NOTIFICATIONS, &config(&cut, &kafka), &["serve"]).await);
            refused(&refusal, "run `notifications import` again");
        }
    }
    // the first, four of messages, the last
    assert_eq!(cuts, 6);
    assert_eq!(import(&whole, &kafka, &[]).await.0, Some(0));
    assert_eq!(written(&cut).await, written(&whole).await);
}
