//! Stock that arrives: all lines or none, and the same delivery once, over gRPC and from a file.

use std::{fs, path::PathBuf, time::Duration};

use futures::future::join_all;
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    oracle,
    test_app::{TestApp, config},
};

#[tokio::test]
async fn a_delivery_is_booked_once() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    assert!(
        !app.receive("d1", &[(1, 7, 2), (2, 7, 3), (1, 7, 4)])
            .await
            .unwrap()
    );
    assert_eq!(app.stocks(7).await, [(1, 6), (2, 3)]);
    // the same goods, written differently
    assert!(app.receive("d1", &[(2, 7, 3), (1, 7, 6)]).await.unwrap());
    assert_eq!(app.stocks(7).await, [(1, 6), (2, 3)]);

    let refused = app
        .receive("d1", &[(2, 7, 3), (1, 7, 7)])
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let reason = refused.get_details_error_info().expect("ErrorInfo").reason;
    assert_eq!(reason, "DELIVERY_ID_REUSED");
    assert_eq!(app.stocks(7).await, [(1, 6), (2, 3)]);

    let calls = join_all((0..20).map(|_| app.receive("d2", &[(1, 7, 1), (3, 8, 1)]))).await;
    let booked = calls
        .iter()
        .filter(|again| !*again.as_ref().unwrap())
        .count();
    assert_eq!(booked, 1);
    assert_eq!(app.stocks(7).await, [(1, 7), (2, 3)]);
    app.finish().await;
}

#[tokio::test]
async fn a_delivery_with_a_wrong_line_books_nothing() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let fields = async |id: &str, lines: &[(i64, u32, u64)]| {
        let status = app.receive(id, lines).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let bad = status.get_details_bad_request().expect("BadRequest");
        bad.field_violations
            .into_iter()
            .map(|violation| violation.field)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        fields("d", &[(1, 7, 1), (0, 7, 1)]).await,
        ["lines[1].warehouse_id"]
    );
    assert_eq!(fields("d", &[(1, 0, 1), (1, 7, 1)]).await, ["lines[0].sku"]);
    assert_eq!(fields("d", &[(1, 7, 0)]).await, ["lines[0].count"]);
    assert_eq!(fields("d", &[(1, 7, u64::MAX)]).await, ["lines[0].count"]);
    assert_eq!(fields("d", &[]).await, ["lines"]);
    assert_eq!(fields("", &[(1, 7, 1)]).await, ["delivery_id"]);
    assert_eq!(
        fields("é", &[(-1, 7, 1)]).await,
        ["delivery_id", "lines[0].warehouse_id"]
    );
    assert_eq!(
        oracle::count(&pool, "SELECT count(*) FROM loms.delivery").await,
        0
    );
    // refused by the last line of defence, after the first rows were written: still nothing
    oracle::run(
        &pool,
        "ALTER TABLE loms.stock ADD CONSTRAINT no_nines CHECK (sku <> 9)",
    )
    .await;
    let broken = app.receive("d", &[(1, 7, 1), (1, 9, 1)]).await.unwrap_err();
    assert_eq!(broken.code(), Code::Internal);
    assert!(!broken.message().contains("no_nines"), "{broken:?}");
    assert_eq!(app.stocks(7).await, []);
    assert!(!app.receive("d", &[(1, 7, 1)]).await.unwrap());
    app.finish().await;
}

struct File(PathBuf);

impl File {
    fn new(text: &str) -> File {
        let path = std::env::temp_dir().join(format!("{}.csv", uuid::Uuid::new_v4()));
        fs::write(&path, text).expect("a file");
        File(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

#[tokio::test]
async fn a_file_is_received_whole_or_not_at_all() {
    let pool = crate::database().await;
    let config = config(&pool, json!({}));
    let receive = async |text: &str, id: Option<&str>| {
        let file = File::new(text);
        let said =
            loms::receive_file(&config, &file.0, id.map(str::to_owned), Duration::ZERO).await;
        said.map_err(|error| format!("{error:#}"))
    };
    let units = "SELECT coalesce(sum(count), 0)::bigint FROM loms.stock";
    let good = "warehouse_id,sku,count\n1,7,2\r\n2,7,3\n1,7,1\n";
    let said = receive(good, Some("march")).await.unwrap();
    assert!(said.contains("march") && said.contains("6 units"), "{said}");
    let again = receive("sku,warehouse_id,count\n7,1,3\n7,2,3\n", Some("march"))
        .await
        .unwrap();
    assert!(again.contains("before"), "{again}");
    assert_eq!(oracle::count(&pool, units).await, 6);
    let other = receive("warehouse_id,sku,count\n1,7,9\n", Some("march"))
        .await
        .unwrap_err();
    assert!(other.contains("delivery id"), "{other}");

    for (text, named) in [
        ("warehouse_id,sku,count\n1,7,2\n1,0,3\n", "line 3"),
        ("warehouse_id,sku,count\n1,7,2\n1,8,3\n1,9,zero\n", "line 4"),
        ("warehouse_id,sku,count\n1,7\n", "line 2"),
        ("warehouse_id,sku,count\n0,7,1\n", "line 2"),
        ("warehouse_id,sku,count\n1,7,-1\n", "line 2"),
        ("warehouse_id,sku,count\n\n\n1,7,2\n\n1,7,0\n", "line 6"),
        ("warehouse_id,sku,count\r\n1,7,2\r\n1,7,0\r\n", "line 3"),
        ("warehouse_id,sku\n1,7\n", "count"),
        ("warehouse_id,sku,count\n", "empty"),
        ("", "empty"),
    ] {
        let error = receive(text, None).await.unwrap_err();
        assert!(error.contains(named), "{named}: {error}");
    }
    assert_eq!(oracle::count(&pool, units).await, 6);

    // without an id the same file is one delivery
    let file = File::new("warehouse_id,sku,count\n3,7,4\n");
    let first = loms::receive_file(&config, &file.0, None, Duration::ZERO)
        .await
        .unwrap();
    let again = loms::receive_file(&config, &file.0, None, Duration::ZERO)
        .await
        .unwrap();
    assert!(
        first.contains("4 units") && again.contains("before"),
        "{first}; {again}"
    );
    assert_eq!(oracle::count(&pool, units).await, 10);
    let missing =
        loms::receive_file(&config, &PathBuf::from("nowhere.csv"), None, Duration::ZERO).await;
    assert!(format!("{:#}", missing.unwrap_err()).contains("nowhere.csv"));
}
