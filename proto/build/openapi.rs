//! Writes the OpenAPI 3.1 document of each service's HTTP door. rest_over_grpc makes paths and schemas of the descriptors;
//! what it cannot know is added: comments, examples, refusals, old aliases, and how requests and responses differ.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fs,
    path::Path,
};

use protox::prost_reflect::{
    DescriptorPool, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor,
    prost_types::FileDescriptorProto,
};
use rest_over_grpc::build::{DescriptorOptions, Generator, OpenApiInfo, ServiceDefinition};
use serde_json::{Map, Value, json};

const ROUTES: &str = "routes.txt";
/// A body for each path, which the local stack of `make up` accepts.
const EXAMPLES: &str = "examples.json";
/// The components of an error body, as `platform::error::json_body` writes it.
const REFUSALS: &str = "refusals.json";
/// What the services check of a field, by its full name, in the words of JSON Schema.
/// `orders.max_lines` can be set; its default is here.
const BOUNDS: &str = "bounds.json";

/// As much of google/api/annotations.proto as the routes need.
const HTTP_RULE: &str = r#"syntax = "proto3";
package google.api;
import "google/protobuf/descriptor.proto";
message HttpRule {
  string post = 4;
  string body = 7;
}
extend google.protobuf.MethodOptions {
  HttpRule http = 72295728;
}
"#;

const JSON: &str = "Every route is a POST of the whole message as proto3 JSON. 64-bit integers are strings; a request may send \
them as numbers. A response has every field, defaults included, and an unset message is `null`. A request may leave a field out, \
spell it in snake_case or send `null`, and unknown fields are ignored; a field that is given twice, or spelled in other upper \
and lower case, is refused. A body is at most 16 KiB, of `/createOrder` 1 MiB. Every response carries its trace id in `x-trace-id`.";

/// What any call may be answered with, whatever its method says.
const ALWAYS: [&str; 5] = [
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
];
/// The HTTP status of each code that a method's comment may name, as in `platform::error::http_status`.
const STATUSES: [(&str, &str); 10] = [
    ("INVALID_ARGUMENT", "400"),
    ("FAILED_PRECONDITION", "400"),
    ("OUT_OF_RANGE", "400"),
    ("NOT_FOUND", "404"),
    ("ALREADY_EXISTS", "409"),
    ("ABORTED", "409"),
    ("RESOURCE_EXHAUSTED", "429"),
    ("INTERNAL", "500"),
    ("UNAVAILABLE", "503"),
    ("DEADLINE_EXCEEDED", "504"),
];

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A row of `routes.txt`.
struct Route {
    service: String,
    path: String,
    /// As in a descriptor: `cart.Cart.AddToCart`.
    method: String,
    /// The method's first path, which this one repeats for old clients.
    alias_of: Option<String>,
}

impl Route {
    fn first(&self) -> &str {
        self.alias_of.as_deref().unwrap_or(&self.path)
    }
}

/// Writes `<service>.openapi.json` into `out` for every service in `routes.txt`.
pub fn write(files: &[&str], out: &Path) -> Outcome<()> {
    for input in [ROUTES, EXAMPLES, REFUSALS, BOUNDS] {
        println!("cargo:rerun-if-changed={input}");
    }
    let routes = routes(&fs::read_to_string(ROUTES)?)?;
    let examples: Value = serde_json::from_str(&fs::read_to_string(EXAMPLES)?)?;
    let refusals: Value = serde_json::from_str(&fs::read_to_string(REFUSALS)?)?;
    let bounds: Value = serde_json::from_str(&fs::read_to_string(BOUNDS)?)?;
    let descriptors = annotated(files, &routes, &out.join("annotated"))?;
    let pool = DescriptorPool::decode(descriptors.as_slice())?;
    check_bounds(&pool, &bounds)?;
    for definition in ServiceDefinition::from_fds(&descriptors, &DescriptorOptions::new())? {
        let package = format!("{}.", definition.module_name());
        let own = || routes.iter().filter(|row| row.method.starts_with(&package));
        let first = own().next().ok_or("a document without a route")?;
        let mut document = generated(&first.service, definition)?;
        document["info"]["description"] = about(&method(&pool, first)?).into();

        let (mut paths, mut answered) = (Map::new(), BTreeSet::new());
        for route in own() {
            let method = method(&pool, route)?;
            reach(&method.output(), &mut answered);
            let mut operation = document["paths"][route.first()]["post"].clone();
            complete_operation(&mut operation, route, &method);
            operation["requestBody"]["content"]["application/json"]["example"] =
                examples[&route.path].clone();
            paths.insert(route.path.clone(), json!({ "post": operation }));
        }
        document["paths"] = paths.into();
        let components = &mut document["components"];
        complete_components(components, &pool, &answered, &refusals, &bounds);
        let file = out.join(format!("{}.openapi.json", first.service));
        fs::write(file, serde_json::to_string_pretty(&document)?)?;
    }
    Ok(())
}

fn routes(text: &str) -> Outcome<Vec<Route>> {
    let mut routes: Vec<Route> = Vec::new();
    let rows = text.lines();
    for row in rows.filter(|row| !row.is_empty() && !row.starts_with('#')) {
        let [service, path, method] = row.split_whitespace().collect::<Vec<_>>()[..] else {
            return Err(format!("{ROUTES}: {row}").into());
        };
        let method = method.trim_start_matches('/').replace('/', ".");
        let first = routes.iter().find(|route| route.method == method);
        routes.push(Route {
            service: service.to_owned(),
            path: path.to_owned(),
            alias_of: first.map(|route| route.path.clone()),
            method,
        });
    }
    Ok(routes)
}

/// Descriptors of copies that have the routes as google.api.http rules, which is what rest_over_grpc reads. The contract
/// itself has none: clients see its descriptors by reflection.
fn annotated(files: &[&str], routes: &[Route], dir: &Path) -> Outcome<Vec<u8>> {
    const SYNTAX: &str = "syntax = \"proto3\";";
    fs::create_dir_all(dir.join("google/api"))?;
    fs::write(dir.join("google/api/annotations.proto"), HTTP_RULE)?;
    for file in files {
        let mut text = fs::read_to_string(Path::new("api").join(file))?;
        let import = format!("{SYNTAX}\nimport \"google/api/annotations.proto\";");
        text = text.replacen(SYNTAX, &import, 1);
        for route in routes.iter().filter(|route| route.alias_of.is_none()) {
            let [package, _, name] = route.method.split('.').collect::<Vec<_>>()[..] else {
                return Err(format!("{ROUTES}: {}", route.method).into());
            };
            if !text.contains(&format!("\npackage {package};")) {
                continue;
            }
            let rpc = text.find(&format!("\n  rpc {name}(")).ok_or(name)?;
            let end = rpc + text[rpc..].find(';').ok_or(name)?;
            let path = &route.path;
            let rule =
                format!(" {{ option (google.api.http) = {{ post: \"{path}\" body: \"*\" }}; }}");
            text.replace_range(end..=end, &rule);
        }
        fs::write(dir.join(file), text)?;
    }
    let mut compiler = protox::Compiler::new([dir])?;
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files(files)?;
    Ok(compiler.encode_file_descriptor_set())
}

fn generated(service: &str, definition: ServiceDefinition) -> Outcome<Value> {
    let info = OpenApiInfo::new(service, env!("CARGO_PKG_VERSION")).add_server("/");
    let mut generator = Generator::builder().emit_openapi_spec(Some(info)).build();
    generator.add(definition);
    let (_, outputs) = generator.generate()?;
    let text = outputs.first().and_then(|output| output.openapi_spec());
    Ok(serde_json::from_str(text.ok_or("no document")?)?)
}

fn method(pool: &DescriptorPool, route: &Route) -> Outcome<MethodDescriptor> {
    let (service, name) = route.method.rsplit_once('.').unwrap_or_default();
    let service = pool.get_service_by_name(service);
    let method = service.and_then(|service| service.methods().find(|method| method.name() == name));
    Ok(method.ok_or_else(|| format!("{ROUTES}: {} is no method", route.method))?)
}

/// What the file of the service says it is for, and what is so on every route.
fn about(method: &MethodDescriptor) -> String {
    /// The number of `FileDescriptorProto.package`.
    const PACKAGE: i32 = 2;
    let service = method.parent_service();
    let package = comment(service.parent_file_descriptor_proto(), &[PACKAGE]);
    format!("{package}\n\n{JSON}")
}

/// Notes a message and every message in it.
fn reach(message: &MessageDescriptor, seen: &mut BTreeSet<String>) {
    if seen.insert(message.full_name().to_owned()) {
        for field in message.fields() {
            if let Kind::Message(inner) = field.kind() {
                reach(&inner, seen);
            }
        }
    }
}

fn complete_operation(operation: &mut Value, route: &Route, method: &MethodDescriptor) {
    let service = method.parent_service();
    let said = comment(service.parent_file_descriptor_proto(), method.path());
    operation["operationId"] = route.path.trim_start_matches('/').into();
    operation["tags"] = json!([service.full_name()]);
    let summary = said.split(". ").next().unwrap_or(&said);
    // the page shows a summary as it is, a description as Markdown
    operation["summary"] = summary.trim_end_matches('.').replace('`', "").into();
    if let Some(first) = &route.alias_of {
        operation["summary"] = format!("What old clients call for {first}").into();
        operation["deprecated"] = true.into();
    }
    operation["description"] = said.as_str().into();

    let generated = operation["responses"].take();
    let mut responses = Map::from_iter([("200".to_owned(), generated["200"].clone())]);
    for (status, codes) in refusals(&said) {
        let mut response = generated["default"].clone();
        response["description"] = codes.join(", ").into();
        responses.insert(status.to_owned(), response);
    }
    responses.insert("default".to_owned(), generated["default"].clone());
    for response in responses.values_mut() {
        response["headers"] =
            json!({ "x-trace-id": { "$ref": "#/components/headers/x-trace-id" } });
    }
    operation["responses"] = responses.into();
}

/// The codes that a call may be refused with, by HTTP status.
fn refusals(said: &str) -> BTreeMap<&'static str, Vec<&'static str>> {
    let mut found = BTreeMap::from([("413", vec!["RESOURCE_EXHAUSTED: the body is too large"])]);
    for (code, status) in STATUSES {
        if ALWAYS.contains(&code) || said.contains(code) {
            found.entry(status).or_default().push(code);
        }
    }
    found
}

fn complete_components(
    components: &mut Value,
    pool: &DescriptorPool,
    answered: &BTreeSet<String>,
    refusals: &Value,
    bounds: &Value,
) {
    for (name, schema) in components["schemas"].as_object_mut().into_iter().flatten() {
        if let Some(message) = pool.get_message_by_name(name) {
            complete_message(schema, &message, answered.contains(name), bounds);
        }
    }
    for (kind, added) in refusals.as_object().into_iter().flatten() {
        for (name, component) in added.as_object().into_iter().flatten() {
            components[kind][name] = component.clone();
        }
    }
}

fn complete_message(
    schema: &mut Value,
    message: &MessageDescriptor,
    answered: bool,
    bounds: &Value,
) {
    let mut properties = Map::new();
    for field in message.fields() {
        let name = field.json_name();
        let mut property = schema["properties"][name].take();
        complete_field(&mut property, &field, answered);
        bound_field(&mut property, &bounds[field.full_name()]);
        properties.insert(name.to_owned(), property);
    }
    if answered {
        schema["required"] = properties.keys().cloned().collect();
    }
    schema["properties"] = properties.into();
    let said = comment(message.parent_file_descriptor_proto(), message.path());
    if !said.is_empty() {
        schema["description"] = said.into();
    }
}

fn complete_field(property: &mut Value, field: &FieldDescriptor, answered: bool) {
    let value = if field.is_list() {
        &mut property["items"]
    } else {
        &mut *property
    };
    match field.kind() {
        Kind::Int64 | Kind::Uint64 => {
            let sign = if field.kind() == Kind::Int64 {
                "-?"
            } else {
                ""
            };
            value["pattern"] = format!("^{sign}[0-9]+$").into();
            value["examples"] = json!(["1"]);
            if !answered {
                value["type"] = json!(["string", "integer"]);
            }
        }
        Kind::Uint32 => {
            value["minimum"] = 0.into();
            value["maximum"] = u32::MAX.into();
        }
        Kind::Message(_) if answered && !field.is_list() => {
            *value = json!({ "anyOf": [value.take(), { "type": "null" }] });
        }
        _ => {}
    }
    let file = field.parent_message().parent_file_descriptor_proto();
    let said = comment(file, field.path());
    if !said.is_empty() {
        property["description"] = said.into();
    }
}

/// Adds what the service checks; what is a string for its 64 bits has no minimum, but a pattern.
fn bound_field(property: &mut Value, bounds: &Value) {
    for (keyword, bound) in bounds.as_object().into_iter().flatten() {
        property[keyword] = bound.clone();
    }
    if bounds["minimum"] == 1 && property.get("pattern").is_some() {
        property["pattern"] = "^[1-9][0-9]*$".into();
    }
}

/// A row of a field that there is not would bound nothing.
fn check_bounds(pool: &DescriptorPool, bounds: &Value) -> Outcome<()> {
    for name in bounds.as_object().into_iter().flat_map(Map::keys) {
        let (message, field) = name.rsplit_once('.').unwrap_or_default();
        let message = pool.get_message_by_name(message);
        if message.is_none_or(|message| message.get_field_by_name(field).is_none()) {
            return Err(format!("{BOUNDS}: {name} is no field").into());
        }
    }
    Ok(())
}

/// The comment above what is at `path` in a file, as one paragraph.
fn comment(file: &FileDescriptorProto, path: &[i32]) -> String {
    let locations = file.source_code_info.iter().flat_map(|info| &info.location);
    let above = locations.filter(|location| location.path == path);
    let lines = above.flat_map(|location| location.leading_comments().lines());
    lines.map(str::trim).collect::<Vec<_>>().join(" ")
}
