"""The protocol's messages as JSON over HTTP, and the schema of that JSON.

Protobuf's own JSON writes 64-bit integers as strings and leaves defaults out; Triton's HTTP writes
numbers, and everything.
"""

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

Kind = FieldDescriptor
INTEGERS = (Kind.TYPE_INT32, Kind.TYPE_INT64, Kind.TYPE_UINT32, Kind.TYPE_UINT64)
FLOATS = (Kind.TYPE_FLOAT, Kind.TYPE_DOUBLE)


def plain(message: Message) -> dict[str, Any]:
    """A field of a message that is not set, and a choice not taken, are left out."""
    return {
        field.name: plain_field(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def plain_field(field: Any, value: Any) -> Any:
    if is_map(field):
        kind = field.message_type.fields_by_name["value"]
        return {str(key): plain_one(kind, one) for key, one in sorted(value.items())}
    if field.is_repeated:
        return [plain_one(field, one) for one in value]
    return plain_one(field, value)


def plain_one(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value


def is_map(field: Any) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def schema_of(message: Descriptor, known: dict[str, Any]) -> dict[str, Any]:
    """A reference to the message's schema, which is added to `known` with those it refers to."""
    name = message.full_name.rpartition("inference.")[2]
    if name not in known:
        known[name] = {}
        known[name] = {
            "type": "object",
            "properties": {field.name: schema_of_field(field, known) for field in message.fields},
            "required": [field.name for field in message.fields if not field.has_presence],
        }
    return {"$ref": f"#/components/schemas/{name}"}


def schema_of_field(field: Any, known: dict[str, Any]) -> dict[str, Any]:
    if is_map(field):
        values = schema_of_one(field.message_type.fields_by_name["value"], known)
        return {"type": "object", "additionalProperties": values}
    one = schema_of_one(field, known)
    return {"type": "array", "items": one} if field.is_repeated else one


def schema_of_one(field: Any, known: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None:
        return schema_of(field.message_type, known)
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    if field.type == Kind.TYPE_BOOL:
        return {"type": "boolean"}
    if field.type in FLOATS:
        return {"type": "number"}
    assert field.type in INTEGERS or field.type == Kind.TYPE_STRING, field.full_name
    return {"type": "integer" if field.type in INTEGERS else "string"}
