//! `query-qmp-schema`: the schema as clients see it, names of types masked by numbers.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{Alternate, Enum, Int, Member, Object, Type, commands, events};

/// The SchemaInfo array: all commands and events that exist, and every type they lead to.
pub fn introspect() -> Value {
    let mut walk = Walk::default();
    for command in commands() {
        let arg_type = walk.object(command.args);
        let ret_type = walk.name(command.result);
        let info = json!({"name": command.name, "meta-type": "command", "arg-type": arg_type, "ret-type": ret_type});
        walk.add(info, command.features);
    }
    for event in events() {
        let arg_type = walk.object(event.data);
        walk.add(
            json!({"name": event.name, "meta-type": "event", "arg-type": arg_type}),
            &[],
        );
    }
    Value::Array(walk.entries)
}

/// Entries so far and the names already given. Types are told apart by what makes them unique: the
/// address of a static, or the name of the element for arrays.
#[derive(Default)]
struct Walk {
    entries: Vec<Value>,
    named: HashMap<Key, String>,
    arrays: HashMap<String, ()>,
    builtins: HashMap<&'static str, ()>,
}

type Key = (&'static str, usize);

impl Walk {
    fn name(&mut self, ty: Type) -> String {
        match ty {
            Type::Str => self.builtin("str", "string"),
            Type::Int(Int::I64 | Int::U8 | Int::U16 | Int::U32 | Int::U64 | Int::Size) => {
                self.builtin("int", "int")
            }
            Type::Number => self.builtin("number", "number"),
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Null => self.builtin("null", "null"),
            Type::Any => self.builtin("any", "value"),
            Type::Enum(kind) => self.enumeration(kind),
            Type::Object(object) => self.object(object),
            Type::Alternate(alternate) => self.alternate(alternate),
            Type::Array(element) => self.array(*element),
        }
    }

    fn builtin(&mut self, name: &'static str, json_type: &str) -> String {
        if self.builtins.insert(name, ()).is_none() {
            self.add(
                json!({"name": name, "meta-type": "builtin", "json-type": json_type}),
                &[],
            );
        }
        name.into()
    }

    fn array(&mut self, element: Type) -> String {
        let element = self.name(element);
        let name = format!("[{element}]");
        if self.arrays.insert(name.clone(), ()).is_none() {
            let info = json!({"name": name, "meta-type": "array", "element-type": element});
            self.add(info, &[]);
        }
        name
    }

    fn enumeration(&mut self, kind: &'static Enum) -> String {
        let key = ("enum", std::ptr::from_ref(kind) as usize);
        self.once(key, |_, name| {
            let members: Vec<Value> = kind.values.iter().map(|v| json!({"name": v})).collect();
            json!({"name": name, "meta-type": "enum", "members": members, "values": kind.values})
        })
    }

    fn alternate(&mut self, alternate: &'static Alternate) -> String {
        let key = ("alternate", std::ptr::from_ref(alternate) as usize);
        self.once(key, |walk, name| {
            let types = alternate.types.iter();
            let members: Vec<Value> = types.map(|ty| json!({"type": walk.name(*ty)})).collect();
            json!({"name": name, "meta-type": "alternate", "members": members})
        })
    }

    fn object(&mut self, object: &'static Object) -> String {
        let key = ("object", std::ptr::from_ref(object) as usize);
        self.once(key, |walk, name| {
            let all = object.all_members().into_iter();
            let seen = all.filter(|member| member.refused.is_none());
            let members: Vec<Value> = seen.map(|member| walk.member(member)).collect();
            let mut info = json!({"name": name, "meta-type": "object", "members": members});
            if let Some(variants) = object.variants {
                info["tag"] = variants.tag.into();
                info["variants"] = walk.variants(object, variants.tag);
            }
            info
        })
    }

    fn member(&mut self, member: &'static Member) -> Value {
        let mut info = Map::new();
        info.insert("name".into(), member.name.into());
        info.insert("type".into(), self.name(member.ty).into());
        if member.optional {
            info.insert("default".into(), Value::Null);
        }
        if !member.features.is_empty() {
            info.insert("features".into(), json!(member.features));
        }
        Value::Object(info)
    }

    /// Every value of the tag has its case; those without members of their own lead to the empty object.
    fn variants(&mut self, object: &'static Object, tag: &str) -> Value {
        let members = object.all_members();
        let ty = members.iter().find(|member| member.name == tag);
        let Some(Type::Enum(kind)) = ty.map(|member| member.ty) else {
            unreachable!("the tag of {} is an enum", object.name);
        };
        let case = |case: &&'static str| {
            let branch = object.branch(case).unwrap_or(&super::EMPTY);
            json!({"case": case, "type": self.object(branch)})
        };
        kind.values.iter().map(case).collect()
    }

    /// Names a type and adds its entry unless that was done; the name is given first, as types recur.
    fn once(&mut self, key: Key, entry: impl FnOnce(&mut Walk, &str) -> Value) -> String {
        if let Some(name) = self.named.get(&key) {
            return name.clone();
        }
        let name = self.named.len().to_string();
        self.named.insert(key, name.clone());
        let info = entry(self, &name);
        self.add(info, &[]);
        name
    }

    fn add(&mut self, mut info: Value, features: &[&str]) {
        if !features.is_empty() {
            info["features"] = json!(features);
        }
        self.entries.push(info);
    }
}
