//! The command line: what an operator types, what it prints, and how it exits.

use std::process::Output;

use serde_json::json;
use sqlx::ConnectOptions as _;

use crate::{
    oracle,
    process::{self, File, run},
    test_app::eventually,
};

/// The exit code, and what was printed where.
fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[tokio::test]
async fn an_empty_database_is_migrated_once() {
    let pool = testkit::empty_database("loms").await;
    let config = process::config(&pool, "orders", &json!({}));
    let (code, _, error) = said(&run(&config, &["audit"]).await);
    assert_eq!(code, Some(1), "{error}");
    for _ in 0..2 {
        let migrated = said(&run(&config, &["migrate"]).await);
        assert_eq!(migrated, (Some(0), String::new(), String::new()));
        let audited = said(&run(&config, &["audit"]).await);
        let clean = "audit: 0 orders, 0 units received, 0 differences".to_owned();
        assert_eq!(audited, (Some(0), clean, String::new()));
    }
    let applied = "SELECT count(*) FROM loms._sqlx_migrations WHERE success";
    let known = loms::MIGRATOR.iter().count() as i64;
    assert_eq!(oracle::count(&pool, applied).await, known);
}

#[tokio::test]
async fn a_delivery_is_received_from_a_file() {
    let pool = crate::database().await;
    let config = process::config(&pool, "orders", &json!({}));
    let receive = async |text: &str| {
        let file = File::new(text);
        let arguments = ["stock", "receive", file.path(), "--delivery", "march"];
        said(&run(&config, &arguments).await)
    };
    let march = "warehouse_id,sku,count\n1,7,2\n2,7,3\n1,7,1\n";
    let (code, printed, _) = receive(march).await;
    assert_eq!(code, Some(0));
    assert_eq!(printed, "delivery march received: 6 units in 2 lines");
    // the same rows again, in another order
    let (code, printed, _) = receive("warehouse_id,sku,count\n2,7,3\n1,7,3\n").await;
    assert_eq!(code, Some(0));
    assert_eq!(
        printed,
        "delivery march had been received before: nothing changed"
    );
    let (code, printed, error) = receive("warehouse_id,sku,count\n1,7,4\n").await;
    assert_eq!((code, printed.as_str()), (Some(1), ""));
    assert!(error.contains("the delivery id was used"), "{error}");
    let (code, _, error) = receive("warehouse_id,sku,count\n1,8,1\n1,0,1\n").await;
    assert_eq!(code, Some(1));
    assert!(error.contains("line 3.sku must not be 0"), "{error}");
    let units = "SELECT sum(count)::bigint FROM loms.stock";
    assert_eq!(oracle::count(&pool, units).await, 6);
}

#[tokio::test]
async fn an_audit_that_finds_something_prints_it_and_fails() {
    let pool = crate::database().await;
    let config = process::config(&pool, "orders", &json!({}));
    let stock = File::new("warehouse_id,sku,count\n1,7,2\n");
    let received = run(&config, &["stock", "receive", stock.path()]).await;
    assert!(received.status.success(), "{received:?}");
    for drift in [
        "UPDATE loms.stock SET count = count + 1",
        "UPDATE loms.relay SET sent = sent + 1",
    ] {
        oracle::run(&pool, drift).await;
    }
    let (code, printed, error) = said(&run(&config, &["audit"]).await);
    assert_eq!((code, error.as_str()), (Some(1), ""));
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(
        lines,
        [
            "stock: sku 7 warehouse 1: on sale 3 + reserved 0 + sold 0 is not received 2",
            "events: 0 steps of histories, but 1 sent + 0 waiting",
            "audit: 0 orders, 2 units received, 2 differences",
        ]
    );
}

#[tokio::test]
async fn what_cannot_be_is_one_line_and_a_code_of_its_own() {
    let pool = crate::database().await;
    let wrong = process::config(
        &pool,
        "orders",
        &json!({"orders": {"paymnt_timeout": "1s"}}),
    );
    for command in ["serve", "migrate", "audit"] {
        let (code, printed, error) = said(&run(&wrong, &[command]).await);
        assert_eq!((code, printed.as_str()), (Some(64), ""), "{command}");
        assert!(error.contains("paymnt_timeout"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let config = process::config(&pool, "orders", &json!({}));
    // clap's own code for a command that there is none of
    let (code, _, error) = said(&run(&config, &["place"]).await);
    assert_eq!(code, Some(2));
    assert!(error.contains("place"), "{error}");
    let (code, help, _) = said(&run(&config, &["--help"]).await);
    assert_eq!(code, Some(0));
    for command in ["serve", "migrate", "stock", "audit"] {
        assert!(help.contains(&format!("\n  {command}")), "{help}");
    }
}

#[tokio::test]
async fn a_database_that_stays_away_is_one_line_and_69() {
    let pool = crate::database().await;
    let options = (*pool.connect_options()).clone();
    let refused = options.clone().host("127.0.0.1").port(1);
    let no_name = options.clone().host("nowhere.invalid");
    let no_database = options.clone().database("nowhere");
    let no_role = options.clone().username("nobody").password("wrong");
    let stock = File::new("warehouse_id,sku,count\n1,7,2\n");
    let receive = ["stock", "receive", stock.path(), "--wait", "300ms"];
    let commands = [
        &["migrate", "--wait", "300ms"][..],
        &["audit", "--wait", "300ms"],
        &receive,
    ];
    for (away, says) in [
        (refused, "127.0.0.1:1: "),
        (no_name, "nowhere.invalid"),
        (no_database, "database \"nowhere\" does not exist"),
        (no_role, "nobody"),
    ] {
        let postgres = json!({"connection_string": away.to_url_lossy().to_string()});
        let config = process::config(&pool, "orders", &json!({"postgres": postgres}));
        for command in commands {
            let (code, printed, error) = said(&run(&config, command).await);
            assert_eq!(
                (code, printed.as_str()),
                (Some(69), ""),
                "{command:?} {error}"
            );
            assert_eq!(error.lines().count(), 1, "{error}");
            assert!(error.contains(says), "{error}");
        }
    }
}

#[tokio::test]
async fn a_database_that_only_reads_is_waited_for() {
    let pool = testkit::empty_database("loms").await;
    let config = process::config(&pool, "orders", &json!({}));
    let set = |what: &str| {
        let database = pool.connect_options().get_database().unwrap().to_owned();
        sqlx::AssertSqlSafe(format!("ALTER DATABASE \"{database}\" {what}"))
    };
    let read_only = set("SET default_transaction_read_only = on");
    sqlx::raw_sql(read_only).execute(&pool).await.unwrap();
    let (code, _, error) = said(&run(&config, &["migrate", "--wait", "300ms"]).await);
    assert_eq!(code, Some(69), "{error}");
    assert!(error.contains("read-only"), "{error}");
    let sessions = "SELECT coalesce(sum(sessions), 0)::bigint FROM pg_stat_database WHERE datname = current_database()";
    let before = oracle::count(&pool, sessions).await;
    let recover = async {
        eventually("some tries", async || {
            oracle::count(&pool, sessions).await >= before + 3
        })
        .await;
        let reset = set("RESET default_transaction_read_only");
        let mut tx = pool.begin_with("BEGIN READ WRITE").await.unwrap();
        sqlx::raw_sql(reset).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
    };
    let (migrated, ()) = tokio::join!(run(&config, &["migrate"]), recover);
    assert_eq!(said(&migrated), (Some(0), String::new(), String::new()));
}

/// A file of the system that this one replaces: its connection string, its port as text, and a key
/// that is none of ours.
#[tokio::test]
async fn a_file_of_the_system_before_is_read() {
    let pool = crate::database().await;
    let options = pool.connect_options();
    let url = testkit::url(&pool);
    let (_, after_user) = url.split_once("loms:").unwrap();
    let (password, _) = after_user.split_once('@').unwrap();
    let pairs = format!(
        "host={} port={} user=loms password='{password}' dbname={} sslmode=disable",
        options.get_host(),
        options.get_port(),
        options.get_database().unwrap(),
    );
    let changes = json!({
        "postgres": {"connection_string": pairs, "test_db_connection_string": "host=elsewhere"},
        "jaeger": {"host": "", "port": "6831"},
    });
    let config = process::config(&pool, "orders", &changes);
    let (code, printed, error) = said(&run(&config, &["audit"]).await);
    assert_eq!(code, Some(0), "{error}");
    assert!(printed.starts_with("audit: 0 orders"), "{printed}");
    let told = "postgres.test_db_connection_string is no key of this service, it is ignored";
    assert!(error.ends_with(told), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}
