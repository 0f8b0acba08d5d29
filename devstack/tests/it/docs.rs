//! What the services say of themselves over HTTP: the page at `/docs` is whole without a network, and the document behind it
//! is what the service does, held against its real answers.

use std::collections::BTreeSet;

use boon::{Compiler, Schemas};
use devstack::clients::{Answer, Door, Http};
use proto::openapi;
use serde_json::{Value, json};

use crate::test_stack::{TestStack, eventually};

const HEART: u32 = 85_123_001;
const DOORS: [(Door, &str); 3] = [
    (Door::Checkout, openapi::CHECKOUT),
    (Door::Loms, openapi::LOMS),
    (Door::Notifications, openapi::NOTIFICATIONS),
];

/// A document that answers are held against.
struct Described {
    door: Door,
    document: Value,
    schemas: Schemas,
    compiler: Compiler,
}

impl Described {
    fn new(door: Door, document: Value) -> Described {
        let mut compiler = Compiler::new();
        compiler.enable_format_assertions();
        compiler
            .add_resource("mem:///openapi.json", document.clone())
            .unwrap();
        Described {
            door,
            document,
            schemas: Schemas::new(),
            compiler,
        }
    }

    /// The routes, with their examples, in the order of the document.
    fn examples(&self) -> Vec<(String, Value)> {
        let paths = self.document["paths"].as_object().unwrap();
        let examples = paths.iter().map(|(path, item)| {
            let body = &item["post"]["requestBody"]["content"]["application/json"];
            (path.clone(), body["example"].clone())
        });
        examples.collect()
    }

    /// The answer is one that the document lists for the path, its body fits the schema there, its trace id too.
    #[track_caller]
    fn fits(&mut self, path: &str, answer: &Answer) {
        let (status, body) = (answer.status.to_string(), &answer.body);
        let listed = &self.document["paths"][path]["post"]["responses"][&status];
        assert!(
            listed.is_object(),
            "{path} does not say {status}, which is {body}"
        );
        let schema = &listed["content"]["application/json"]["schema"]["$ref"];
        let schema = schema.as_str().unwrap().to_owned();
        self.is_valid(&schema, body, path);
        let trace_id = answer.headers["x-trace-id"].to_str().unwrap();
        self.is_valid(
            "#/components/headers/x-trace-id/schema",
            &json!(trace_id),
            path,
        );
    }

    #[track_caller]
    fn is_valid(&mut self, schema: &str, value: &Value, path: &str) {
        let schema = self
            .compiler
            .compile(&format!("mem:///openapi.json{schema}"), &mut self.schemas)
            .unwrap();
        let valid = self.schemas.validate(value, schema);
        assert!(valid.is_ok(), "{path} {value}: {}", valid.unwrap_err());
    }

    async fn post(&mut self, http: &Http, path: &str, body: &Value) -> Answer {
        let answer = http.post(self.door, path, body).await.unwrap();
        self.fits(path, &answer);
        answer
    }
}

#[tokio::test]
async fn the_examples_of_the_documents_are_a_purchase_and_its_answers_are_as_described() {
    let stack = TestStack::start(&[(1, HEART, 100)]).await;
    let http = &stack.clients.http;
    for (door, text) in DOORS {
        let served = http.get(door, "/openapi.json").await.unwrap();
        let kind = &served.headers["content-type"];
        assert_eq!(
            (served.status, kind),
            (200, &"application/json".parse().unwrap())
        );
        assert_eq!(served.body, serde_json::from_str::<Value>(text).unwrap());

        let mut described = Described::new(door, served.body);
        for (path, example) in described.examples() {
            let answer = described.post(http, &path, &example).await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        }
    }
    // an empty list fits any schema: the two orders' events must have been told
    let mut described = Described::new(Door::Notifications, parsed(openapi::NOTIFICATIONS));
    let (path, example) = described.examples().remove(0);
    eventually("the history has all events", async || {
        let answer = http.post(Door::Notifications, &path, &example).await;
        answer.unwrap().body["messages"].as_array().unwrap().len() == 6
    })
    .await;
    described.post(http, &path, &example).await;
    stack.finish().await;
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn refusals_are_as_described() {
    let stack = TestStack::start(&[(1, HEART, 3)]).await;
    let http = &stack.clients.http;
    let [mut checkout, mut loms, mut notifications] =
        DOORS.map(|(door, text)| Described::new(door, parsed(text)));
    for described in [&mut checkout, &mut loms, &mut notifications] {
        for (path, _) in described.examples() {
            let nothing = described.post(http, &path, &json!({})).await;
            assert!([400, 404].contains(&nothing.status), "{path}");
            let not_json = http.post_text(described.door, &path, "{".into()).await;
            described.fits(&path, &not_json.unwrap());
            let huge = " ".repeat(4_194_305);
            let huge = http.post_text(described.door, &path, huge).await.unwrap();
            assert_eq!(huge.status, 413);
            described.fits(&path, &huge);
        }
    }

    let order = json!({"user": 1, "items": [{"sku": HEART, "count": 4}]});
    let failed = loms.post(http, "/createOrder", &order).await;
    assert_eq!(failed.body["shortages"][0]["available"], "3");
    let refusals = [
        ("/purchase", json!({"user": 1}), 400, "ErrorInfo"),
        (
            "/addToCart",
            json!({"user": 1, "sku": HEART, "count": 4}),
            400,
            "ErrorInfo",
        ),
        (
            "/addToCart",
            json!({"user": 0, "sku": 0}),
            400,
            "BadRequest",
        ),
        (
            "/deleteFromCart",
            json!({"user": 1, "sku": HEART, "count": 1}),
            404,
            "ErrorInfo",
        ),
    ];
    for (path, body, status, detail) in refusals {
        refused(&checkout.post(http, path, &body).await, status, detail);
    }
    let pay = json!({"orderID": failed.body["orderID"]});
    let refusals = [
        ("/orderPayed", pay.clone(), 400, "PreconditionFailure"),
        ("/cancelOrder", pay, 400, "PreconditionFailure"),
        ("/createOrder", json!({"user": 1}), 400, "BadRequest"),
    ];
    for (path, body, status, detail) in refusals {
        refused(&loms.post(http, path, &body).await, status, detail);
    }
    stack.finish().await;
}

#[track_caller]
fn refused(answer: &Answer, status: u16, detail: &str) {
    let kind = format!("type.googleapis.com/google.rpc.{detail}");
    let said = (answer.status, answer.body["details"][0]["@type"].as_str());
    assert_eq!(said, (status, Some(kind.as_str())), "{}", answer.body);
}

/// What a page refers to: the values of `src` and `href`.
fn references(page: &str) -> BTreeSet<&str> {
    let attributes = ["src=\"", "href=\""].into_iter().flat_map(|attribute| {
        let values = page.split(attribute).skip(1);
        values.map(|rest| rest.split('"').next().unwrap())
    });
    attributes.collect()
}

#[tokio::test]
async fn the_page_needs_nobody_but_the_service() {
    let stack = TestStack::start(&[]).await;
    let http = &stack.clients.http;
    for (door, _) in DOORS {
        let text = async |path: &str| {
            let answer = http.get(door, path).await.unwrap();
            assert_eq!(answer.status, 200, "{path}");
            let policy = answer.headers["content-security-policy"].to_str().unwrap();
            assert!(policy.starts_with("default-src 'self';"), "{policy}");
            assert!(
                !policy.contains("http") && !policy.contains('*'),
                "{policy}"
            );
            answer.body.as_str().unwrap().to_owned()
        };
        // the client follows to /docs/, where the page's relative references start
        let page = text("/docs").await;
        let references = references(&page);
        assert!(references.len() >= 5, "{references:?}");
        for reference in references {
            let file = reference.strip_prefix("./").unwrap_or(reference);
            assert!(!file.contains([':', '/']), "{reference} is elsewhere");
            let content = text(&format!("/docs/{file}")).await;
            assert!(!content.is_empty(), "{file}");
            if file.ends_with(".css") {
                let urls = content.split("url(").skip(1);
                for url in urls {
                    let inline = url.trim_start_matches('"').starts_with("data:");
                    assert!(inline, "{}", &url[..url.len().min(60)]);
                }
            }
        }
        let unknown = http.get(door, "/docs/unknown").await.unwrap();
        assert_eq!((unknown.status, &unknown.body["code"]), (404, &json!(5)));

        let settings = text("/docs/swagger-initializer.js").await;
        assert!(settings.contains(r#""url": "/openapi.json""#), "{settings}");
        assert!(settings.contains(r#""validatorUrl": "none""#), "{settings}");
        assert!(
            !settings.contains("http:") && !settings.contains("https:"),
            "{settings}"
        );
    }
    stack.finish().await;
}
