//! Holds the OpenAPI documents against `routes.txt` and against the JSON that the messages really have: what a service reads
//! and writes fits its schema, and what it would not does not.

use std::collections::{BTreeMap, BTreeSet};

use boon::{Compiler, SchemaIndex, Schemas};
use platform::json;
use prost::{Message, Name};
use prost_reflect::DescriptorPool;
use prost_types::MethodDescriptorProto;
use proto::{cart, loms, notifications, openapi};
use serde::Serialize;
use serde_json::{Value, json};

const ROUTES: &str = include_str!("../routes.txt");

fn documents() -> BTreeMap<&'static str, Value> {
    let texts = [
        ("checkout", openapi::CHECKOUT),
        ("loms", openapi::LOMS),
        ("notifications", openapi::NOTIFICATIONS),
    ];
    texts
        .map(|(service, text)| (service, serde_json::from_str(text).unwrap()))
        .into()
}

/// Service, path and method of each row.
fn routes() -> Vec<[&'static str; 3]> {
    let rows = ROUTES.lines();
    rows.filter(|row| !row.is_empty() && !row.starts_with('#'))
        .map(|row| {
            let columns: Vec<_> = row.split_whitespace().collect();
            columns.try_into().unwrap()
        })
        .collect()
}

/// The schemas of a document.
struct Checked {
    schemas: Schemas,
    compiler: Compiler,
}

impl Checked {
    fn new(document: &Value) -> Checked {
        let mut compiler = Compiler::new();
        compiler.enable_format_assertions();
        compiler
            .add_resource("mem:///openapi.json", document.clone())
            .unwrap();
        Checked {
            schemas: Schemas::new(),
            compiler,
        }
    }

    fn schema(&mut self, message: &str) -> SchemaIndex {
        let at = format!("mem:///openapi.json#/components/schemas/{message}");
        self.compiler.compile(&at, &mut self.schemas).unwrap()
    }

    #[track_caller]
    fn fits(&mut self, message: &str, value: &Value) {
        let schema = self.schema(message);
        let fits = self.schemas.validate(value, schema);
        assert!(fits.is_ok(), "{message} {value}: {}", fits.unwrap_err());
    }

    #[track_caller]
    fn does_not_fit(&mut self, message: &str, value: &Value) {
        let schema = self.schema(message);
        assert!(
            self.schemas.validate(value, schema).is_err(),
            "{message}: {value}"
        );
    }

    /// What the service writes, defaults and all, fits.
    #[track_caller]
    fn written<M: Serialize + Default>(&mut self, message: &str, full: &M) {
        self.fits(message, &serde_json::to_value(full).unwrap());
        self.fits(message, &serde_json::to_value(M::default()).unwrap());
    }
}

fn operation<'a>(documents: &'a BTreeMap<&str, Value>, service: &str, path: &str) -> &'a Value {
    &documents[service]["paths"][path]["post"]
}

/// What a request or an answer refers to.
fn schema_of(body: &Value) -> &str {
    let reference = body["content"]["application/json"]["schema"]["$ref"].as_str();
    reference
        .unwrap()
        .strip_prefix("#/components/schemas/")
        .unwrap()
}

#[test]
fn every_route_is_in_the_document_of_its_service_and_nothing_else_is() {
    let documents = documents();
    let mut described = Vec::new();
    for (service, document) in &documents {
        for (path, item) in document["paths"].as_object().unwrap() {
            let verbs: Vec<_> = item.as_object().unwrap().keys().collect();
            assert_eq!(verbs, ["post"], "{path}");
            described.push((*service, path.as_str()));
        }
        assert!(!document.to_string().contains("ReceiveStock"), "{service}");
    }
    let mut listed: Vec<_> = routes()
        .iter()
        .map(|[service, path, _]| (*service, *path))
        .collect();
    listed.sort_unstable();
    described.sort_unstable();
    assert_eq!(described, listed);
}

#[test]
fn a_page_that_has_the_document_calls_where_it_came_from() {
    for (service, document) in documents() {
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["title"], service);
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(document["servers"], json!([{ "url": "/" }]));
    }
}

#[test]
fn an_operation_is_its_method() {
    let documents = documents();
    let descriptors = prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap();
    let methods: BTreeMap<_, _> = descriptors
        .file
        .iter()
        .flat_map(|file| file.service.iter().map(move |service| (file, service)))
        .flat_map(|(file, service)| {
            let path = format!("/{}.{}", file.package(), service.name());
            let named = move |method| {
                (
                    format!("{path}/{}", MethodDescriptorProto::name(method)),
                    method,
                )
            };
            service.method.iter().map(named)
        })
        .collect();
    let mut known = BTreeSet::new();
    for [service, path, method] in routes() {
        let operation = operation(&documents, service, path);
        let (request, answer) = (&operation["requestBody"], &operation["responses"]["200"]);
        let types = (methods[method].input_type(), methods[method].output_type());
        let described = (
            &*format!(".{}", schema_of(request)),
            &*format!(".{}", schema_of(answer)),
        );
        assert_eq!(described, types, "{path}");
        assert_eq!(operation["operationId"], path[1..]);
        for text in ["summary", "description"] {
            assert!(!operation[text].as_str().unwrap().is_empty(), "{path}");
        }
        let repeats = !known.insert(method);
        assert_eq!(operation["deprecated"] == true, repeats, "{path}");
    }
}

#[test]
fn an_operation_lists_the_refusals_that_its_comment_names() {
    let documents = documents();
    let always = ["400", "413", "429", "500", "503", "504"];
    for [service, path, _] in routes() {
        let responses = &operation(&documents, service, path)["responses"];
        for status in always {
            assert_eq!(schema_of(&responses[status]), "google.rpc.Status", "{path}");
        }
        let finds_something = [
            "/deleteFromCart",
            "/listCart",
            "/listCartRequest",
            "/listOrder",
            "/orderPayed",
            "/cancelOrder",
        ];
        let listed = responses.get("404").is_some();
        assert_eq!(listed, finds_something.contains(&path), "{path}");
    }
    let added = operation(&documents, "checkout", "/addToCart");
    let refused = &added["responses"]["400"]["description"];
    assert_eq!(refused, "INVALID_ARGUMENT, FAILED_PRECONDITION");
}

#[test]
fn every_example_fits() {
    for (_, document) in documents() {
        let mut checked = Checked::new(&document);
        for (path, item) in document["paths"].as_object().unwrap() {
            let request = &item["post"]["requestBody"];
            let example = &request["content"]["application/json"]["example"];
            assert!(example.is_object(), "{path} has no example");
            checked.fits(schema_of(request), example);
        }
    }
}

#[test]
fn what_a_service_writes_fits() {
    let documents = documents();
    let at = || {
        Some(pbjson_types::Timestamp {
            seconds: 1_291_197_600,
            nanos: 250_000_000,
        })
    };
    let mut loms = Checked::new(&documents["loms"]);
    let item = loms::OrderItem {
        sku: u32::MAX,
        count: 65_535,
    };
    loms.written(
        "loms.ListOrderResponse",
        &loms::ListOrderResponse {
            status: "awaiting payment".into(),
            user: i64::MIN,
            items: vec![item],
            payment_deadline: at(),
            history: vec![loms::StatusChange {
                sequence: 1,
                status: "new".into(),
                actor: "user".into(),
                at: at(),
                from_status: "new".into(),
            }],
            created_at: at(),
        },
    );
    loms.written(
        "loms.CreateOrderResponse",
        &loms::CreateOrderResponse {
            order_id: 7,
            status: "failed".into(),
            shortages: vec![loms::Shortage {
                sku: 1,
                requested: u64::MAX,
                available: 0,
            }],
        },
    );
    loms.written("google.protobuf.Empty", &pbjson_types::Empty {});
    let mut cart = Checked::new(&documents["checkout"]);
    cart.written(
        "cart.ListCartResponse",
        &cart::ListCartResponse {
            items: vec![cart::CartGoodInfo {
                sku: 1,
                count: 2,
                name: "mug".into(),
                price: 199,
            }],
            total_price: 398,
        },
    );
    let mut history = Checked::new(&documents["notifications"]);
    history.written(
        "notifications.GetHistoryWithPeriodResponse",
        &notifications::GetHistoryWithPeriodResponse {
            messages: vec![notifications::Message {
                created_at: at(),
                ..Default::default()
            }],
            next_page_token: "next".into(),
        },
    );
}

#[test]
fn what_a_service_would_not_write_does_not_fit() {
    let mut loms = Checked::new(&documents()["loms"]);
    let order = serde_json::to_value(loms::ListOrderResponse::default()).unwrap();
    let with = |field: &str, value: Value| {
        let mut changed = order.clone();
        changed[field] = value;
        changed
    };
    let wrong = [
        with("user", json!(7)),
        with("user", json!("seven")),
        with("items", Value::Null),
        with("items", json!([{ "sku": "1", "count": 1 }])),
        with("items", json!([{ "sku": 1 }])),
        with("paymentDeadline", json!("tomorrow")),
        with("status", Value::Null),
    ];
    for order in wrong {
        loms.does_not_fit("loms.ListOrderResponse", &order);
    }
    for field in order.as_object().unwrap().keys() {
        let mut without = order.clone();
        without.as_object_mut().unwrap().shift_remove(field);
        loms.does_not_fit("loms.ListOrderResponse", &without);
    }
    loms.does_not_fit("loms.Stock", &json!({ "warehouseID": "1", "count": "-1" }));
}

/// Reads `body` as the HTTP door does.
fn is_read<M: Message + Name + Default>(body: &Value) -> bool {
    let contract = DescriptorPool::decode(proto::DESCRIPTORS).unwrap();
    let shape = contract.get_message_by_name(&M::full_name()).unwrap();
    json::read::<M>(&shape, body.to_string().as_bytes()).is_ok()
}

/// Bodies that are read and fit, that are not read and do not fit, and that are read and then
/// refused by the service.
#[track_caller]
fn agree<M: Message + Name + Default>(
    checked: &mut Checked,
    fine: &[Value],
    unread: &[Value],
    refused: &[Value],
) {
    let message = M::full_name();
    for body in fine {
        assert!(is_read::<M>(body), "{message} {body}");
        checked.fits(&message, body);
    }
    for body in unread {
        assert!(!is_read::<M>(body), "{message} {body}");
        checked.does_not_fit(&message, body);
    }
    for body in refused {
        assert!(is_read::<M>(body), "{message} {body}");
        checked.does_not_fit(&message, body);
    }
}

#[test]
fn a_request_fits_if_the_service_takes_it() {
    let documents = documents();
    agree::<cart::AddToCartRequest>(
        &mut Checked::new(&documents["checkout"]),
        &[
            json!({ "user": "7", "sku": 1, "count": 2 }),
            json!({ "user": 7, "sku": u32::MAX, "count": 65_535 }),
            json!({ "user": i64::MAX.to_string() }),
            json!({}),
            json!({ "user": 7, "coupon": { "code": "X" } }),
        ],
        &[
            json!({ "user": "seven" }),
            json!({ "user": 1.5 }),
            json!({ "user": [7] }),
            json!({ "user": true }),
            json!({ "user": "" }),
            json!({ "user": 7, "sku": -1 }),
            json!({ "user": 7, "sku": 1.5 }),
            json!({ "user": 7, "sku": 4_294_967_296_u64 }),
            json!([]),
            json!("text"),
        ],
        &[
            json!({ "user": 0 }),
            json!({ "user": "0" }),
            json!({ "user": i64::MIN.to_string() }),
            json!({ "sku": 0 }),
            json!({ "count": 0 }),
            json!({ "count": 65_536 }),
        ],
    );
    let items = |count| json!({ "items": vec![json!({ "sku": 1, "count": 1 }); count] });
    let key = |length| json!({ "idempotencyKey": "k".repeat(length) });
    agree::<loms::CreateOrderRequest>(
        &mut Checked::new(&documents["loms"]),
        &[items(1), items(10_000), key(0), key(128)],
        &[
            items(10_001),
            json!({ "items": {} }),
            json!({ "items": [[]] }),
        ],
        &[items(0), key(129), json!({ "idempotencyKey": "é" })],
    );
    let day = |day| json!({ "year": 2010, "month": 12, "day": day });
    agree::<notifications::GetHistoryWithPeriodRequest>(
        &mut Checked::new(&documents["notifications"]),
        &[json!({ "user": "7", "from": day(1), "to": day(31), "pageSize": 1000 })],
        &[
            json!({ "user": "7", "from": "2010-12-01" }),
            json!({ "user": "7", "pageSize": "ten" }),
        ],
        &[
            json!({ "to": day(0) }),
            json!({ "to": day(32) }),
            json!({ "pageSize": -1 }),
            json!({ "pageSize": 1001 }),
        ],
    );
}
