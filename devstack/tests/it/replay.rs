//! The first orders of the retail folder, replayed by the command line against what the model says of them.

use std::{fmt::Write as _, fs, path::Path};

use devstack::retail::Folder;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    model::{self, RETAIL},
    test_stack::devstack,
};

/// The first `orders` orders, with so little stock that some fail.
fn slice(orders: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str| fs::read_to_string(Path::new(RETAIL).join(name)).unwrap();
    fs::write(dir.path().join("products.csv"), read("products.csv")).unwrap();
    let mut rows = read("orders.csv");
    let end = rows
        .find(&format!("\n{},", orders + 1))
        .expect("there are more orders");
    rows.truncate(end + 1);
    fs::write(dir.path().join("orders.csv"), rows).unwrap();
    let mut stock = "warehouse_id,sku,count\n".to_owned();
    for line in Folder::read(Path::new(RETAIL))
        .unwrap()
        .stock
        .iter()
        .filter(|line| line.count >= 24)
    {
        writeln!(
            stock,
            "{},{},{}",
            line.warehouse_id,
            line.sku,
            line.count / 24
        )
        .unwrap();
    }
    fs::write(dir.path().join("stock.csv"), stock).unwrap();
    let expected = model::expected(&Folder::read(dir.path()).unwrap());
    fs::write(dir.path().join("expected.json"), expected.to_string()).unwrap();
    dir
}

async fn replay(dir: &Path, through: &str, concurrency: &str) -> (Option<i32>, String) {
    let folder = dir.to_str().unwrap();
    let json = format!("{folder}/out.json");
    let arguments = [
        "replay",
        folder,
        "--through",
        through,
        "--concurrency",
        concurrency,
        "--json",
        &json,
        "--no-build",
    ];
    let output = devstack(&arguments, dir).await;
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[tokio::test]
async fn one_shopper_at_a_time_gives_what_the_model_says() {
    let dir = slice(40);
    let expected: Value =
        serde_json::from_slice(&fs::read(dir.path().join("expected.json")).unwrap()).unwrap();
    assert_ne!(
        expected["through_the_cart"]["refused_lines"], 0,
        "the slice must be short of stock"
    );
    assert_ne!(
        expected["straight_to_loms"]["failed"], 0,
        "the slice must be short of stock"
    );
    for (through, section) in [("cart", "through_the_cart"), ("loms", "straight_to_loms")] {
        let (code, stderr) = replay(dir.path(), through, "1").await;
        assert_eq!(code, Some(0), "{through}: {stderr}");
        let out: Value =
            serde_json::from_slice(&fs::read(dir.path().join("out.json")).unwrap()).unwrap();
        assert_eq!(out[section], expected[section]);
        assert_eq!(out["repeated_sku_lines"], expected["repeated_sku_lines"]);
        assert_eq!(out["audit"]["consistent"], true);
    }
}

#[tokio::test]
async fn many_shoppers_conserve_the_stock() {
    let dir = slice(60);
    for through in ["cart", "loms"] {
        let (code, stderr) = replay(dir.path(), through, "8").await;
        assert_eq!(code, Some(0), "{through}: {stderr}");
    }
}

#[tokio::test]
async fn a_difference_is_named_and_exits_1() {
    let dir = slice(3);
    let file = dir.path().join("expected.json");
    let mut expected: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    expected["straight_to_loms"]["payed"] = 77.into();
    fs::write(&file, expected.to_string()).unwrap();
    let (code, stderr) = replay(dir.path(), "loms", "1").await;
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr.contains("straight_to_loms.payed: expected 77, got"),
        "{stderr}"
    );
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_a_misuse() {
    let dir = tempfile::tempdir().unwrap();
    let (code, stderr) = replay(dir.path(), "cart", "1").await;
    assert_eq!(code, Some(64), "{stderr}");
    assert!(
        stderr.contains("orders.csv") && stderr.lines().count() == 1,
        "{stderr}"
    );
}
