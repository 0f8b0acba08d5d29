//! Holds the OpenAPI documents against `routes.txt` and against the JSON that the messages really have: what a service reads
//! and writes fits its schema, and what it would not does not.

use std::collections::{BTreeMap, BTreeSet};

use boon::{Compiler, SchemaIndex, Schemas};
use prost::Message as _;
use prost_types::MethodDescriptorProto;
use proto::{cart, loms, notifications, openapi};
use serde::{Serialize, de::DeserializeOwned};
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

#[test]
fn a_request_fits_if_the_service_can_read_it() {
    fn agree<M: DeserializeOwned>(checked: &mut Checked, message: &str, body: Value, fits: bool) {
        let read = serde_json::from_value::<M>(body.clone());
        assert_eq!(read.is_ok(), fits, "{message} {body}");
        if fits {
            checked.fits(message, &body);
        } else {
            checked.does_not_fit(message, &body);
        }
    }
    let documents = documents();
    let mut cart = Checked::new(&documents["checkout"]);
    let adds = [
        (json!({ "user": "7", "sku": 1, "count": 2 }), true),
        (json!({ "user": 7, "sku": 1, "count": 2 }), true),
        (json!({ "user": i64::MIN.to_string() }), true),
        (json!({}), true),
        (json!({ "user": 7, "coupon": { "code": "X" } }), true),
        (json!({ "user": "seven" }), false),
        (json!({ "user": 1.5 }), false),
        (json!({ "user": [7] }), false),
        (json!({ "user": true }), false),
        (json!({ "user": 7, "sku": -1 }), false),
        (json!({ "user": 7, "sku": 1.5 }), false),
        (json!({ "user": 7, "sku": 4_294_967_296_u64 }), false),
        (json!([]), false),
        (json!("text"), false),
    ];
    for (body, fits) in adds {
        agree::<cart::AddToCartRequest>(&mut cart, "cart.AddToCartRequest", body, fits);
    }
    let mut history = Checked::new(&documents["notifications"]);
    let day = json!({ "year": 2010, "month": 12, "day": 1 });
    let periods = [
        (
            json!({ "user": "7", "from": day, "to": day, "pageSize": 10 }),
            true,
        ),
        (json!({ "user": "7", "from": "2010-12-01" }), false),
        (json!({ "user": "7", "pageSize": "ten" }), false),
    ];
    for (body, fits) in periods {
        agree::<notifications::GetHistoryWithPeriodRequest>(
            &mut history,
            "notifications.GetHistoryWithPeriodRequest",
            body,
            fits,
        );
    }
}
