//! Questions about the history, over both doors: whole days, one order, pages, and every refusal.

use proto::notifications::{GetHistoryWithPeriodRequest, Message};
use serde_json::{Value, json};
use sqlx::PgPool;
use tonic::{Code, codec::CompressionEncoding};
use tonic_types::StatusExt as _;

use crate::{
    kafka::Kafka,
    test_app::{TestApp, date, eventually, request},
};

const PAGES: i64 = 50;

/// `count` messages of a user, five a second from `from` on; every order has three.
async fn fill(pool: &PgPool, user: i64, from: &str, count: i32) {
    let statement = "INSERT INTO notifications.message
        (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset,
         told_at)
        SELECT $1, $1 * 1000000 + i / 3 + 1, i % 3 + 1, 'new', 'message ' || i,
               $2::timestamptz + interval '1 second' * (i / 5), 'orders', 0, $1 * 1000000 + i, now()
        FROM generate_series(0, $3 - 1) AS i";
    let insert = sqlx::query(statement).bind(user).bind(from).bind(count);
    insert.execute(pool).await.expect("filled");
}

fn key(message: &Message) -> (i64, i32, i64) {
    let at = message.created_at.expect("a time");
    (at.seconds, at.nanos, message.order_id)
}

async fn app(pool: &PgPool) -> TestApp {
    let kafka = Kafka::new().await;
    TestApp::start(pool, &kafka, json!({})).await
}

#[tokio::test]
async fn days_are_whole_in_utc_and_both_included() {
    let pool = crate::database().await;
    for (order, at) in [
        (1, "2024-02-28 23:59:59.999999Z"),
        (2, "2024-02-29 00:00:00Z"),
        (4, "2024-02-29 12:00:00Z"),
        (3, "2024-02-29 12:00:00Z"),
        (5, "2024-02-29 23:59:59.999999Z"),
        (6, "2024-03-01 00:00:00Z"),
    ] {
        fill(&pool, order, at, 1).await;
    }
    sqlx::query("UPDATE notifications.message SET user_id = 7")
        .execute(&pool)
        .await
        .expect("one user");
    let app = app(&pool).await;
    // a client that compresses its requests is answered too
    let mut client = app.grpc.clone().send_compressed(CompressionEncoding::Gzip);
    let mut orders = async |from, to| {
        let answer = client
            .get_history_with_period(request(7, from, to))
            .await
            .expect("a history");
        let messages = answer.into_inner().messages;
        assert!(messages.iter().all(|message| message.user_id == 7));
        messages
            .iter()
            .map(|message| message.order_id / 1_000_000)
            .collect::<Vec<_>>()
    };
    assert_eq!(orders((2024, 2, 29), (2024, 2, 29)).await, [2, 3, 4, 5]);
    assert_eq!(
        orders((2024, 2, 28), (2024, 3, 1)).await,
        [1, 2, 3, 4, 5, 6]
    );
    assert_eq!(orders((2024, 3, 2), (2024, 3, 31)).await, [0_i64; 0]);
    assert_eq!(orders((1, 1, 1), (9999, 12, 31)).await.len(), 6);

    let body = r#"{"user":"7","from":{"year":2024,"month":2,"day":28},"to":{"year":2024,"month":2,"day":28}}"#;
    let (status, answer) = app.post("/history", body).await;
    assert_eq!(status, 200);
    assert_eq!(
        answer,
        json!({"messages": [{"orderId": "1000001", "userId": "7", "status": "new", "message": "message 0",
                             "createdAt": "2024-02-28T23:59:59.999999Z"}], "nextPageToken": ""})
    );
    let (_, nobody) = app.post("/history", &body.replace("\"7\"", "8")).await;
    assert_eq!(nobody, json!({"messages": [], "nextPageToken": ""}));
    app.finish().await;
}

#[tokio::test]
async fn pages_put_together_are_the_whole() {
    let pool = crate::database().await;
    fill(&pool, 7, "2024-01-01 00:00:00Z", 1000).await;
    fill(&pool, 8, "2024-01-01 00:00:00Z", 10).await;
    let mut app = app(&pool).await;
    let whole = app.history(7).await;
    assert_eq!(
        (whole.messages.len(), whole.next_page_token.as_str()),
        (1000, "")
    );
    assert!(whole.messages.is_sorted_by_key(key));

    for page_size in [1000, 333, 7] {
        let (mut pages, mut token) = (Vec::new(), String::new());
        loop {
            let page = GetHistoryWithPeriodRequest {
                page_size,
                page_token: token.clone(),
                ..request(7, (1, 1, 1), (9999, 12, 31))
            };
            let page = app
                .grpc
                .get_history_with_period(page)
                .await
                .expect("a page")
                .into_inner();
            assert!(page.messages.len() <= page_size as usize);
            pages.extend(page.messages);
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(pages, whole.messages, "pages of {page_size}");
    }
    app.finish().await;
}

/// What PostgreSQL counts, so that it is the plan of the service's own statement and not of a copy.
#[tokio::test]
async fn a_page_reads_its_own_rows_from_the_index_wherever_it_is() {
    let pool = crate::database().await;
    for user in 1..=20 {
        fill(&pool, user, "2024-01-01 00:00:00Z", 1000).await;
    }
    let analyze = "VACUUM ANALYZE notifications.message";
    sqlx::query(analyze).execute(&pool).await.expect("analyzed");
    let mut app = app(&pool).await;
    let (mut given, mut token) = (0, String::new());
    for _ in 0..PAGES {
        let page = GetHistoryWithPeriodRequest {
            page_size: 10,
            page_token: token,
            ..request(7, (1, 1, 1), (9999, 12, 31))
        };
        let page = app.grpc.get_history_with_period(page).await;
        let page = page.expect("a page").into_inner();
        given += page.messages.len() as i64;
        token = page.next_page_token;
    }
    assert_eq!(given, PAGES * 10);
    // its connections end, and with that they tell what they counted
    app.finish().await;
    let counted = async || {
        let scans = "SELECT idx_scan, idx_tup_read FROM pg_stat_user_indexes
            WHERE schemaname = 'notifications' AND indexrelname = 'message_history'";
        let scans = sqlx::query_as::<_, (i64, i64)>(scans).fetch_one(&pool);
        scans.await.expect("an index")
    };
    eventually("each page was one scan", async || {
        counted().await.0 >= PAGES
    })
    .await;
    let (_, read) = counted().await;
    // each reads one more than it gives; all that its user has would be a thousand
    assert!(read <= PAGES * 12, "{read} rows read for {given}");
}

#[tokio::test]
async fn more_than_a_caller_without_pages_is_given_is_an_error() {
    let pool = crate::database().await;
    fill(&pool, 7, "2024-01-01 00:00:00Z", 20_000).await;
    let mut app = app(&pool).await;
    assert_eq!(app.history(7).await.messages.len(), 20_000);
    let body = r#"{"user":7,"from":{"year":2024,"month":1,"day":1},"to":{"year":2024,"month":12,"day":31}}"#;
    let (status, answer) = app.post("/history", body).await;
    assert_eq!(
        (status, answer["messages"].as_array().map(Vec::len)),
        (200, Some(20_000))
    );

    let one = "INSERT INTO notifications.message
        (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset)
        VALUES (7, 1, 1, 'new', 'one more', '2024-06-01', 'orders', 0, -2)";
    sqlx::query(one).execute(&pool).await.expect("one more");
    let refused = app
        .grpc
        .get_history_with_period(request(7, (2024, 1, 1), (2024, 12, 31)))
        .await;
    let refused = refused.expect_err("too long");
    assert_eq!(refused.code(), Code::OutOfRange);
    assert_eq!(
        refused.get_details_error_info().expect("a reason").reason,
        "HISTORY_TOO_LONG"
    );
    let (status, answer) = app.post("/history", body).await;
    assert_eq!((status, &answer["code"]), (400, &json!(11)));
    // a page of it is fine
    let page = GetHistoryWithPeriodRequest {
        page_size: 1000,
        ..request(7, (2024, 1, 1), (2024, 12, 31))
    };
    let page = app
        .grpc
        .get_history_with_period(page)
        .await
        .expect("a page")
        .into_inner();
    assert_eq!(page.messages.len(), 1000);
    app.finish().await;
}

#[tokio::test]
async fn refusals_name_every_field_over_both_doors() {
    let pool = crate::database().await;
    let mut app = app(&pool).await;
    let cases = [
        (request(0, (2024, 1, 1), (2024, 1, 1)), vec!["user"]),
        (
            request(-7, (2023, 2, 29), (2024, 13, 1)),
            vec!["user", "from", "to"],
        ),
        (request(7, (2024, 1, 2), (2024, 1, 1)), vec!["from"]),
        (
            GetHistoryWithPeriodRequest {
                user: 7,
                to: date((2024, 1, 1)),
                ..Default::default()
            },
            vec!["from"],
        ),
        (
            GetHistoryWithPeriodRequest::default(),
            vec!["user", "from", "to"],
        ),
        (
            GetHistoryWithPeriodRequest {
                page_size: -1,
                ..request(7, (2024, 1, 1), (2024, 1, 1))
            },
            vec!["page_size"],
        ),
        (
            GetHistoryWithPeriodRequest {
                page_size: 1001,
                page_token: "nonsense".into(),
                ..request(7, (0, 1, 1), (10000, 1, 1))
            },
            vec!["from", "to", "page_size", "page_token"],
        ),
    ];
    for (request, fields) in cases {
        let refused = app
            .grpc
            .get_history_with_period(request.clone())
            .await
            .expect_err("refused");
        assert_eq!(refused.code(), Code::InvalidArgument);
        let violations = refused
            .get_details_bad_request()
            .expect("details")
            .field_violations;
        let named: Vec<_> = violations
            .iter()
            .map(|violation| violation.field.as_str())
            .collect();
        assert_eq!(named, fields);

        let body = serde_json::to_string(&request).expect("JSON");
        let (status, answer) = app.post("/history", &body).await;
        assert_eq!((status, &answer["code"]), (400, &json!(3)), "{answer}");
        let violations = answer["details"][0]["fieldViolations"]
            .as_array()
            .expect("details");
        let named: Vec<&Value> = violations
            .iter()
            .map(|violation| &violation["field"])
            .collect();
        assert_eq!(named, fields);
    }
    for body in ["{", r#"{"user":"x"}"#, r#"{"user":7,"from":"2024-01-01"}"#] {
        let (status, answer) = app.post("/history", body).await;
        assert_eq!(
            (status, &answer["code"]),
            (400, &json!(3)),
            "{body}: {answer}"
        );
    }
    app.finish().await;
}

#[tokio::test]
async fn a_token_serves_only_the_question_it_was_given_for() {
    let pool = crate::database().await;
    fill(&pool, 7, "2024-01-01 00:00:00Z", 10).await;
    let mut app = app(&pool).await;
    let first = GetHistoryWithPeriodRequest {
        page_size: 4,
        ..request(7, (2024, 1, 1), (2024, 1, 1))
    };
    let page = app
        .grpc
        .get_history_with_period(first.clone())
        .await
        .expect("a page")
        .into_inner();
    let next = GetHistoryWithPeriodRequest {
        page_token: page.next_page_token,
        ..first
    };
    for other in [
        GetHistoryWithPeriodRequest {
            user: 8,
            ..next.clone()
        },
        GetHistoryWithPeriodRequest {
            to: date((2024, 1, 2)),
            ..next.clone()
        },
        GetHistoryWithPeriodRequest {
            page_token: format!("{}0", next.page_token),
            page_size: 4,
            from: date((2023, 1, 1)),
            ..next.clone()
        },
    ] {
        let refused = app
            .grpc
            .get_history_with_period(other)
            .await
            .expect_err("another question");
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    // another page size is fine, all the rest too
    let rest = GetHistoryWithPeriodRequest {
        page_size: 0,
        ..next
    };
    let rest = app
        .grpc
        .get_history_with_period(rest)
        .await
        .expect("the rest")
        .into_inner();
    assert_eq!(rest.messages.len(), 6);
    app.finish().await;
}

#[tokio::test]
async fn without_its_database_the_service_says_so() {
    let pool = crate::database().await;
    let mut app = app(&pool).await;
    let mut outage = pool.begin().await.expect("a transaction");
    let lock = "LOCK TABLE notifications.message IN ACCESS EXCLUSIVE MODE";
    sqlx::query(lock)
        .execute(&mut *outage)
        .await
        .expect("locked");
    let refused = app
        .grpc
        .get_history_with_period(request(7, (2024, 1, 1), (2024, 1, 1)))
        .await;
    let refused = refused.expect_err("no answer");
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(
        !refused.message().contains("relation") && !refused.message().contains("SELECT"),
        "causes stay inside: {}",
        refused.message()
    );
    outage.rollback().await.expect("it is back");
    assert!(app.history(7).await.messages.is_empty());
    app.finish().await;
}
