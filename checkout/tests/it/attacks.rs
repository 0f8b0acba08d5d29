//! What a caller sends, or does not read, stops nothing: each attack once, small, on a process of
//! its own. See `testkit::attack` for how large ones are run.

use prost::Message as _;
use proto::cart::{ListCartRequest, cart_client::CartClient};
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::{
    attack::{Attacked, floods, post, scaled, unread},
    http2::{RST_STREAM, Raw, frame, streams},
    process::File,
};
use tonic::transport::Channel;

use crate::test_app::{Neighbours, config, eventually, fill};

const LIST: &str = "/cart.Cart/ListCart";
/// Whose cart is large, and whose is small.
const LARGE: i64 = 1;
const SMALL: i64 = 2;

/// The service, and what it needs for so long: the stand-ins that it calls, its database.
async fn target(limits: Value) -> (Attacked, (Neighbours, PgPool)) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let pool = crate::database().await;
    let neighbours = Neighbours::start().await;
    neighbours.loms.stock(5, 1_000_000);
    fill(&pool, LARGE, &(1..901)).await;
    fill(&pool, SMALL, &(1..4)).await;
    let changes = json!({
        "limits": limits,
        "log": {"level": "warn"},
        // a cart of 900 products is not what is waited for here
        "products": {"per_second": 10_000, "at_once": 1_000},
    });
    let config = File::new(&config(&pool, neighbours.addresses, &changes).to_string());
    let built = env!("CARGO_BIN_EXE_checkout");
    let process = testkit::Process::start(built, &config, "").await;
    let (grpc, http) = (process.grpc(), process.http());
    let connect = move || {
        let endpoint = Channel::from_shared(format!("http://{grpc}")).unwrap();
        CartClient::new(endpoint.connect_lazy())
    };
    eventually("a cart with names and prices", || async {
        let listed = connect().list_cart(ListCartRequest { user: LARGE }).await;
        listed.is_ok_and(|cart| cart.into_inner().items.len() == 900)
    })
    .await;
    let caller = move || {
        let (mut client, web) = (connect(), reqwest::Client::new());
        let url = format!("http://{http}/listCart");
        async move || {
            let listed = client.list_cart(ListCartRequest { user: SMALL }).await;
            listed.map_err(|status| status.to_string())?;
            post(&web, &url, &json!({"user": SMALL})).await
        }
    };
    let attacked = Attacked::start("checkout", (process, config), caller).await;
    (attacked, (neighbours, pool))
}

#[tokio::test(flavor = "multi_thread")]
async fn carts_that_are_not_read() {
    let limits = json!({"write_timeout": "1s", "idle_timeout": "3s"});
    let (attacked, _needed) = target(limits).await;
    let large = ListCartRequest { user: LARGE }.encode_to_vec();
    unread::windows(&attacked, LIST, &large).await;
    unread::sockets(&attacked, LIST, &large).await;
    let body = json!({"user": LARGE}).to_string();
    unread::requests(&attacked, "/listCart", &body).await;
    attacked.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames_streams_and_beginnings() {
    let limits = json!({"idle_timeout": "2s", "request_timeout": "2s"});
    let (attacked, _needed) = target(limits).await;
    floods::of_streams(&attacked, LIST).await;
    floods::of_frames(&attacked, LIST).await;
    floods::of_metadata(&attacked, LIST).await;
    floods::of_beginnings(&attacked, "/listCart").await;
    attacked.finish().await;
}

/// Calls that write, of one user and of many, each reset before it has its answer.
#[tokio::test(flavor = "multi_thread")]
async fn writers_that_leave() {
    let (attacked, _needed) = target(json!({})).await;
    let add = "/cart.Cart/AddToCart";
    let mut leaving = Raw::connect(attacked.grpc(), add, &[]).await;
    for stream in streams(scaled(2_000)) {
        let user = if stream % 4 == 1 {
            SMALL + 1
        } else {
            i64::from(stream) + 10
        };
        let message = proto::cart::AddToCartRequest {
            user,
            sku: 5,
            count: 1,
        };
        let mut call = leaving.whole(stream, &message.encode_to_vec());
        call.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
        if !leaving.say(&call).await {
            leaving = Raw::connect(attacked.grpc(), add, &[]).await;
        }
        if stream % 500 == 1 {
            attacked.is_alive().await;
        }
    }
    for code in ["Internal", "Unknown", "Unavailable"] {
        assert_eq!(attacked.counted(code, add).await, 0, "{code}");
    }
    attacked.finish().await;
}
