// Opens an ONNX file by netron's own reader (beside this file), and prints what it shows as JSON.
import fs from 'node:fs';
import path from 'node:path';
import * as base from './base.js';
import * as onnx from './onnx.js';
import * as protobuf from './protobuf.js';

const file = process.argv[2];
const stream = new base.BinaryStream(new Uint8Array(fs.readFileSync(file)));

function rewound(read) {
    stream.seek(0);
    const found = read();
    stream.seek(0);
    return found;
}

const context = {
    identifier: path.basename(file),
    stream,
    set(type, value) { this.type = type; this.value = value; return type; },
    async peek() { return null; },
    async tags(kind) { return kind === 'pb' ? rewound(() => protobuf.BinaryReader.open(stream).signature()) : new Map(); },
    async read(kind) { return kind === 'protobuf.binary' ? protobuf.BinaryReader.open(stream) : null; },
    async require(name) { return import(`${name}.js`); },
    async asset(name) { return fs.readFileSync(name, 'utf-8'); },
    async fetch(name) {
        return { stream: new base.BinaryStream(new Uint8Array(fs.readFileSync(path.join(path.dirname(file), name)))) };
    },
};
const factory = new onnx.ModelFactory();
await factory.match(context);
const model = await factory.open(context);
const [graph] = model.modules;
console.log(JSON.stringify({
    format: model.format,
    imports: model.imports,
    inputs: graph.inputs.map((input) => input.name),
    outputs: graph.outputs.map((output) => output.name),
    operators: graph.nodes.map((node) => `${node.type.module}.${node.type.name}`),
}));
